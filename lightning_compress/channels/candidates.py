"""What the graphs alone say of a network's channels: candidates for groups, before any trial."""

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
from lightning_compress.channels.reshapes import Seen
from lightning_compress.channels.sandbox import doubles
from lightning_compress.core.evaluation import entries_restored, set_mode
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, tensors
from lightning_compress.core.outputs import TOLERANCE, compare, run

FEW = 2  # samples: batch norms in training mode need two


@dataclass(frozen=True, eq=False)
class Plan:
    """What the graphs alone say: candidates for groups, which may overlap, and the walks that found them."""

    places: Places
    candidates: list[ChannelGroup]
    halved: set[tuple[object, ...]]  # the identities of groups that slices take apart in the middle
    axis_orders: dict[tuple[object, ...], set[int]]  # by the group's identity: where it was found
    walks: list[Walk]
    program: ExportedProgram
    inputs: ExampleInputs  # of the sandbox: in double precision, and few
    factors: dict[str, float]  # of the sandbox's weights, by parameter: what makes the network well conditioned
    trains_alike: bool  # whether the code does the same in training mode, but for dropout and batch statistics

    @classmethod
    def make(cls, model: nn.Module, example_inputs: ExampleInputs) -> Plan:
        """Export the model, which is in the sandbox, in both modes, and follow the channels."""
        inputs, outputs = _trial_inputs(model, example_inputs)
        factors = conditioned(model, inputs, outputs)
        programs = []
        for training in (False, True):
            set_mode(model, training)
            with entries_restored(model):  # what the code keeps for its next call is fake here
                programs.append(export(model, inputs))
            programs[-1].state_dict.clear()  # the graphs are enough: weights are read from the model
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
            with torch._C.DisableTorchFunction():  # the sandbox's precision is for the network's code, not for nodes
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
        """For every axis order, and every node, whether it leaves when some units of some groups do.

        An axis order has the rows or the columns of a dimension that a reshape takes apart: where only some rows
        leave, all columns stay.
        """
        gone = [torch.zeros(self.places.count, dtype=torch.bool) for _ in self.walks]
        nodes = {(place.tensor, place.dim): place.nodes for place in self.places.all()}
        for group, units in drop:
            for axis_order in self.axis_orders[identity(group)]:
                for member in group.members:
                    gone[axis_order][nodes[member.tensor, member.dim][member.index[units].reshape(-1)]] = True
        return gone

    def reshapes(self, group: ChannelGroup) -> dict[str, list[Seen]]:
        """By module, the reshapes in its own code, labelled as in the group's axis order."""
        return {
            module: [Seen(len(before.shape), after.shape, _along_one(after)) for before, after in values]
            for module, values in self.walks[min(self.axis_orders[identity(group)])].reshaped.items()
        }

    def unit_of(self, group: ChannelGroup) -> Tensor:
        """By node the unit of a group, -1 for those of others."""
        found = torch.full((self.places.count,), -1)
        nodes = {(place.tensor, place.dim): place.nodes for place in self.places.all()}
        for member in group.members:
            units = torch.arange(group.size)[:, None].expand_as(member.index)
            found[nodes[member.tensor, member.dim][member.index]] = units
        return found


def _counts(module: nn.Module | None, name: str, place: int | None, nodes: Tensor) -> bool:
    """Return whether a module has a number of this name that counts these nodes; its name alone proves nothing."""
    value = getattr(module, name, None)
    if place is not None:
        value = value[place] if isinstance(value, tuple) and place < len(value) else None
    return isinstance(value, int) and value == len(nodes)


def _along_one(value: Value) -> dict[int, Tensor]:
    """By dimension the nodes of what varies along it alone."""
    return {layer.dims[0]: layer.nodes.reshape(-1) for layer in value.layers if len(layer.dims) == 1}


def _trial_inputs(model: nn.Module, example_inputs: ExampleInputs) -> tuple[ExampleInputs, list[Tensor]]:
    """Two samples in double precision; or as many as there are, where the network mixes them or takes no more.

    Returns:
        The inputs, and what the network makes of them.
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
    except Exception:  # whatever the network's code says to fewer samples: then it gets them all
        return inputs, outputs
    mixed = compare(alone, [first(one) for one in outputs], TOLERANCE) is not None
    return (inputs, outputs) if mixed else (few, alone)


def _dense_output(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    try:
        return run(model, inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on the example inputs in double precision, in which its channel "
            f"groups are tried: {error}"
        ) from error


def _operators(program: ExportedProgram) -> list[str]:
    """What the graph calls, but for the counters of batch norms."""
    return [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and not (str(node.target) == "aten.add_.Tensor" and _is_counter(node.args[0]))
    ]


def _is_counter(node: fx.Node) -> bool:
    return node.op == "placeholder" and not node.meta["val"].is_floating_point()


def _with_two(example_inputs: ExampleInputs) -> list[ExampleInputs]:
    """The example inputs as they are, last; before them what two samples may look like, where there is but one.

    States of recurrent layers come as layers x batch x width, beside inputs whose batch comes first.
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
    except Exception:  # whatever the network's code says to two samples
        return False
    return True


def _groups(places: Places, units: Units) -> list[ChannelGroup]:
    """Collect units whose slices lie alike into groups."""
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
    """For each of the sorted units, the positions where it stands: shape (units, count)."""
    at = torch.isin(units_of, ordered).nonzero().squeeze(1)
    by_unit = torch.argsort(units_of[at], stable=True)
    return at[by_unit].reshape(len(ordered), count)


def _reasons(root: Tensor, said: Sequence[tuple[Tensor, str]]) -> dict[int, str]:
    """The first thing said of every unit."""
    found: dict[int, str] = {}
    for nodes, reason in said:
        for unit in torch.unique(root[nodes]).tolist():
            found.setdefault(unit, reason)
    return found


def identity(group: ChannelGroup) -> tuple[object, ...]:
    """Equal for groups that hold the same units, whichever axis order found them."""
    return tuple((one.tensor, one.dim, tuple(one.index.sort(1).values.reshape(-1).tolist())) for one in group.members)
