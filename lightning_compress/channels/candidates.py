"""Candidates for channel groups: what the exported graphs show, before any trial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils._pytree import tree_map_only

from lightning_compress.channels.conditioning import conditioned
from lightning_compress.channels.graph.units import Units, Value
from lightning_compress.channels.graph.walk import AXIS_ORDERS, OUTPUT, Places, Walk, export
from lightning_compress.channels.groups import SINGLE, Attribute, ChannelGroup, Member
from lightning_compress.channels.reshape_trial import Seen
from lightning_compress.channels.sandbox import doubles
from lightning_compress.core.evaluation import entries_restored, set_mode
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, tensors
from lightning_compress.core.outputs import TOLERANCE, compare, run

FEW = 2  # samples: batch norms in training mode need two


@dataclass(frozen=True, eq=False)
class Plan:
    """What the exported graphs show of a network.

    Attributes:
        places: The nodes of its parameters and buffers.
        candidates: Candidates for groups, which may overlap.
        halved: Identities of the groups whose channels slices take apart in the middle.
        axis_orders: By identity of a group, the axis orders in which it was found.
        walks: One walk through the evaluation graph for every axis order.
        program: The evaluation graph.
        inputs: The inputs of trials: few samples, in double precision.
        factors: By parameter the factor of its trial weights that makes the network well conditioned.
        trains_alike: Whether the network calls the same operators in training mode, apart from batch norms' counters.
    """

    places: Places
    candidates: list[ChannelGroup]
    halved: set[tuple[object, ...]]
    axis_orders: dict[tuple[object, ...], set[int]]
    walks: list[Walk]
    program: ExportedProgram
    inputs: ExampleInputs
    factors: dict[str, float]
    trains_alike: bool

    @classmethod
    def make(cls, model: nn.Module, example_inputs: ExampleInputs) -> Plan:
        """Export the model, which is in the sandbox, in both modes, and follow the channels."""
        inputs, outputs = _trial_inputs(model, example_inputs)
        factors = conditioned(model, inputs, outputs)
        programs = []
        for training in (False, True):
            set_mode(model, training)
            with entries_restored(model):  # the export leaves fake tensors in what the code keeps for its next call
                programs.append(export(model, inputs))
            programs[-1].state_dict.clear()  # frees memory: weights are read from the model
        set_mode(model, False)
        returned = programs[0].graph_signature.output_specs
        if not any(one.kind == OutputKind.USER_OUTPUT and isinstance(one.arg, TensorArgument) for one in returned):
            raise ValueError(f"{type(model).__name__} returns no tensor, so that no cut of it could be checked.")
        places, modules = Places(model), dict(model.named_modules(remove_duplicate=False))
        candidates: dict[tuple[object, ...], ChannelGroup] = {}
        axis_orders: dict[tuple[object, ...], set[int]] = {}
        halved: set[tuple[object, ...]] = set()
        walks = []
        for axis_order in range(AXIS_ORDERS):
            units = Units(places.count)
            with torch._C.DisableTorchFunction():  # nodes are integers and need no double precision
                both = [Walk(program, places, units, axis_order) for program in programs]
                walks.append(both[0])
                unused = set(places.names) - both[0].seen - both[1].seen
                for place in (place for name in unused for place in places.by_name[name]):
                    units.freeze(place.nodes, "it is not used in the forward pass of the example inputs")
                middle = torch.cat([torch.zeros(0, dtype=torch.long), *units.halved])
                nodes = {(place.tensor, place.dim): place.nodes for place in places.all()}
                units.attributes = [one for one in units.attributes if _counts(modules.get(one[0]), *one[1:])]
                for group in _groups(places, units):
                    if any(bool(torch.isin(nodes[one.tensor, one.dim], middle).any()) for one in group.members):
                        halved.add(identity(group))
                    candidates.setdefault(identity(group), group)
                    axis_orders.setdefault(identity(group), set()).add(axis_order)
            if not units.read:
                break
        alike = _operators(programs[0]) == _operators(programs[1])
        return cls(places, list(candidates.values()), halved, axis_orders, walks, programs[0], inputs, factors, alike)

    def removed(self, drop: Iterable[tuple[ChannelGroup, Tensor]]) -> list[Tensor]:
        """Return for every axis order a mask of the nodes that leave with some channels.

        Where a reshape makes rows and columns of a dimension, an axis order knows the groups of either rows or columns.
        A mask of one axis order leaves out the channels of groups that only another one knows.
        """
        gone = [torch.zeros(self.places.count, dtype=torch.bool) for _ in self.walks]
        nodes = {(place.tensor, place.dim): place.nodes for place in self.places.all()}
        for group, channels in drop:
            for axis_order in self.axis_orders[identity(group)]:
                for member in group.members:
                    gone[axis_order][nodes[member.tensor, member.dim][member.index[channels].reshape(-1)]] = True
        return gone

    def reshapes(self, group: ChannelGroup) -> dict[str, list[Seen]]:
        """Return by module the reshapes in its own code, with the labels of the group's axis order."""
        return {
            module: [Seen(len(before.shape), after.shape, _along_one(after)) for before, after in values]
            for module, values in self.walks[min(self.axis_orders[identity(group)])].reshaped.items()
        }

    def channel_of(self, group: ChannelGroup) -> Tensor:
        """Return for every node the number of its channel in the group, -1 for nodes of other groups."""
        found = torch.full((self.places.count,), -1)
        nodes = {(place.tensor, place.dim): place.nodes for place in self.places.all()}
        for member in group.members:
            channels = torch.arange(group.size)[:, None].expand_as(member.index)
            found[nodes[member.tensor, member.dim][member.index]] = channels
        return found


def _counts(module: nn.Module | None, name: str, place: int | None, nodes: Tensor) -> bool:
    """Return whether a module has a number of this name that counts these nodes; its name alone proves nothing."""
    value = getattr(module, name, None)
    if place is not None:
        value = value[place] if isinstance(value, tuple) and place < len(value) else None
    return isinstance(value, int) and value == len(nodes)


def _along_one(value: Value) -> dict[int, Tensor]:
    """Return by dimension the nodes of the layer that varies along this dimension alone."""
    return {layer.dims[0]: layer.nodes.reshape(-1) for layer in value.layers if len(layer.dims) == 1}


def _trial_inputs(model: nn.Module, example_inputs: ExampleInputs) -> tuple[ExampleInputs, list[Tensor]]:
    """Make the inputs of trials: two samples in double precision.

    A network that mixes its samples keeps all of them, and one that takes a single sample keeps that.

    Returns:
        The inputs, and the network's outputs for them.
    """
    *doubled, given = _with_two(example_inputs)
    several = next((one for one in doubled if _runs(model, doubles(one, noise=False))), given)
    for noise in (True, False):  # a logarithm of noise is not a number
        inputs = doubles(several, noise=noise)
        outputs = _dense_output(model, inputs)
        if not any(bool(one.isnan().any()) for one in outputs):
            break
    many = batch_size(inputs)
    if many <= FEW:
        return inputs, outputs

    def first(tensor: Tensor) -> Tensor:
        return tensor[:FEW] if tensor.dim() and tensor.shape[0] == many else tensor

    few: ExampleInputs = tree_map_only(Tensor, first, inputs)
    try:
        alone = run(model, few)
    except Exception:  # the network's code may raise anything for fewer samples, and then gets all of them
        return inputs, outputs
    mixed = compare(alone, [first(one) for one in outputs], TOLERANCE) is not None
    return (inputs, outputs) if mixed else (few, alone)


def _dense_output(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    try:
        return run(model, inputs)
    except Exception as error:
        found = _unregistered(model)
        advice = (
            f". It holds {found}, which torch does not see: make it an nn.ModuleList or nn.ModuleDict" if found else ""
        )
        raise ValueError(
            f"{type(model).__name__} does not run on the example inputs in double precision, in which its channel "
            f"groups are tried: {error}{advice}"
        ) from error


def _unregistered(model: nn.Module) -> str:
    """Return words for the first list or dict of modules that are no children of the module that holds it."""
    known = {id(one) for one in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value
            if name.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            if any(isinstance(one, nn.Module) and id(one) not in known for one in held):
                return f"modules in a plain {type(value).__name__}, {f'{path}.{name}'.lstrip('.')!r}"
    return ""


def _operators(program: ExportedProgram) -> list[str]:
    """Return the operators that a graph calls, without those on the counters of batch norms."""
    return [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and not (str(node.target) == "aten.add_.Tensor" and _is_counter(node.args[0]))
    ]


def _is_counter(node: fx.Node) -> bool:
    return node.op == "placeholder" and not node.meta["val"].is_floating_point()


def _with_two(example_inputs: ExampleInputs) -> list[ExampleInputs]:
    """Return the example inputs, and before them, where they are a single sample, guesses of how two look.

    The batch is the first dimension of inputs, and in one guess the second dimension of states of recurrent layers,
    which are layers x batch x width.
    """
    if batch_size(example_inputs) >= FEW:
        return [example_inputs]
    tree = example_inputs if isinstance(example_inputs, Tensor | tuple) else dict(example_inputs)
    first = tensors(example_inputs)[0]

    def twice(one: Tensor, dim: int) -> Tensor:
        return torch.cat([one, one], dim) if one.dim() > dim and one.shape[dim] == 1 else one

    alike: ExampleInputs = tree_map_only(Tensor, lambda one: twice(one, 0), tree)
    states: ExampleInputs = tree_map_only(Tensor, lambda one: twice(one, 0 if one is first else 1), tree)
    return [alike, states, tree] if len(tensors(example_inputs)) > 1 else [alike, tree]


def _runs(model: nn.Module, inputs: ExampleInputs) -> bool:
    try:
        run(model, inputs)
    except Exception:  # the network's code may raise anything for two samples
        return False
    return True


def _groups(places: Places, units: Units) -> list[ChannelGroup]:
    """Collect into one group all units that have equally many positions in the same tensors."""
    root = units.solve()
    reasons = _reasons(root, units.frozen)
    notes = _reasons(root, units.inexact)
    consumed = torch.zeros(units.count, dtype=torch.bool)
    for nodes in units.consumed:
        consumed[nodes.reshape(-1)] = True
    for nodes in units.produced:
        consumed[nodes.reshape(-1)] = False
    all_places = places.all()
    counts: dict[int, list[tuple[int, int]]] = {}
    for number, place in enumerate(all_places):
        found, how_many = torch.unique(root[place.nodes], return_counts=True)
        for unit, count in zip(found.tolist(), how_many.tolist(), strict=True):
            counts.setdefault(unit, []).append((number, count))
    alike: dict[tuple[tuple[tuple[int, int], ...], bool, str | None], list[int]] = {}
    for unit in sorted(counts):
        alike.setdefault((tuple(counts[unit]), unit in reasons, notes.get(unit)), []).append(unit)
    of_unit = torch.full((units.count,), -1)
    for one, members in enumerate(alike.values()):
        of_unit[torch.tensor(members)] = one
    counters: dict[int, list[tuple[str, str, int | None, Tensor]]] = {}  # by the number of a group
    for module, name, at, nodes in units.attributes:
        for one in torch.unique(of_unit[root[nodes]]).tolist():
            counters.setdefault(one, []).append((module, name, at, root[nodes]))
    groups = []
    for one, ((signature, is_frozen, note), members) in enumerate(alike.items()):
        ordered = torch.tensor(members)
        whys = [reasons[unit] for unit in members] if is_frozen else []
        frozen = next((why for why in whys if why == OUTPUT), whys[0] if whys else None)
        slices = []
        for number, count in signature:
            place = all_places[number]
            index = _positions(root[place.nodes], ordered, count)
            slices.append(Member(place.tensor, place.dim, index, not bool(consumed[place.nodes[index]].any())))
        if not any(made.produces and made.tensor in places.parameters for made in slices):
            continue
        if len(members) == 1 and frozen is None:
            single = all(count == 1 for _, count in signature)
            frozen = SINGLE if single else "all its channels depend on each other"
        attributes: dict[tuple[str, str, int | None], Attribute] = {}
        for module, name, at, of_these in counters.get(one, ()):
            each = torch.bincount(of_these, minlength=units.count)[ordered]
            if int(each.min()) != int(each.max()):
                frozen = frozen or f"{name} of {module!r} counts its channels unevenly"
                continue
            index = _positions(of_these, ordered, int(each[0]))
            attributes[module, name, at] = Attribute(module, name, at, index)
        groups.append(
            ChannelGroup("", len(members), tuple(slices), tuple(attributes.values()), note is None, frozen, note)
        )
    return groups


def _positions(units_of: Tensor, ordered: Tensor, count: int) -> Tensor:
    """Return the positions of each of the sorted units: shape (units, count)."""
    at = torch.isin(units_of, ordered).nonzero().squeeze(1)
    by_unit = torch.argsort(units_of[at], stable=True)
    return at[by_unit].reshape(len(ordered), count)


def _reasons(root: Tensor, said: Sequence[tuple[Tensor, str]]) -> dict[int, str]:
    """Return the first reason that was given for every unit."""
    found: dict[int, str] = {}
    for nodes, reason in said:
        for unit in torch.unique(root[nodes]).tolist():
            found.setdefault(unit, reason)
    return found


def identity(group: ChannelGroup) -> tuple[object, ...]:
    """Return what identifies a group: equal for groups of the same slices, whichever axis order found them."""
    return tuple((one.tensor, one.dim, tuple(one.index.sort(1).values.reshape(-1).tolist())) for one in group.members)
