"""Networks of timm that no test knows, half of every free group cut at random: right? how much is free? how long?

For each, with random weights in double precision: seconds of the planner (wall clock, and the processor's), share of
the parameters that lie in free groups, and the largest difference between the thin network and the dense one with zeros
in what produces the dropped channels, over the largest entry of the latter. Only exact groups are cut, so that the
dense network as it is tells what is right.

    pip install timm
    python benchmarks/unseen_networks.py --only davit_tiny focalnet_tiny_srf --threads 2
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import ChannelGroups, channel_groups

NETWORKS = (  # with the smallest resolution, in pixels, that each is tried at
    *(("bat_resnext26ts", 256), ("beit_base_patch16_224", 224), ("botnet26t_256", 256), ("caformer_s18", 64)),
    *(("cait_xxs24_224", 224), ("coat_tiny", 224), ("coatnet_nano_rw_224", 224), ("convformer_s18", 64)),
    *(("convit_tiny", 224), ("convmixer_768_32", 64), ("convnext_atto", 64), ("convnextv2_atto", 64)),
    *(("crossvit_9_240", 240), ("cs3darknet_s", 64), ("cspresnet50", 64), ("davit_tiny", 224)),
    *(("deit3_small_patch16_224", 224), ("dla34", 64), ("dm_nfnet_f0", 96), ("dpn48b", 64), ("edgenext_xx_small", 64)),
    *(("efficientformer_l1", 224), ("efficientformerv2_s0", 224), ("efficientvit_b0", 64), ("efficientvit_m0", 224)),
    *(("ese_vovnet19b_dw", 64), ("fastvit_t8", 64), ("fbnetc_100", 64), ("focalnet_tiny_srf", 224)),
    *(
        ("gcvit_xxtiny", 224),
        ("ghostnet_100", 64),
        ("ghostnetv2_100", 64),
        ("ghostnetv3_100", 64),
        ("gmixer_24_224", 224),
    ),
    *(("gmlp_s16_224", 224), ("halonet26t", 256), ("hardcorenas_a", 64), ("hgnet_tiny", 64), ("hgnetv2_b0", 64)),
    *(("hiera_tiny_224", 224), ("hrnet_w18_small", 64), ("inception_next_atto", 64), ("inception_v4", 128)),
    *(("lambda_resnet26t", 128), ("lcnet_050", 64), ("levit_128s", 224), ("maxvit_rmlp_pico_rw_256", 256)),
    *(("mixnet_s", 64), ("mobilenetv4_conv_small", 64), ("mobileone_s0", 64), ("mobilevit_xxs", 64)),
    *(("mobilevitv2_050", 64), ("mvitv2_tiny", 224), ("nest_tiny", 224), ("nf_resnet50", 64), ("pit_ti_224", 224)),
    *(("poolformer_s12", 64), ("pvt_v2_b0", 64), ("regnetx_002", 64), ("repghostnet_050", 64), ("repvgg_a0", 64)),
    *(("repvit_m0_9", 64), ("res2net50_14w_8s", 64), ("resmlp_12_224", 224), ("resnest14d", 64), ("rexnet_100", 64)),
    *(("selecsls42b", 64), ("sequencer2d_s", 224), ("skresnet18", 64), ("starnet_s1", 64), ("swiftformer_xs", 224)),
    *(("swin_tiny_patch4_window7_224", 224), ("swinv2_tiny_window8_256", 256), ("tf_efficientnetv2_b0", 64)),
    *(("tinynet_e", 64), ("tiny_vit_5m_224", 224), ("tnt_s_patch16_224", 224), ("tresnet_m", 64)),
    *(("twins_svt_small", 224), ("vgg11_bn", 224), ("visformer_tiny", 224), ("vit_tiny_patch16_224", 224)),
    *(("volo_d1_224", 224), ("xception41", 64), ("xcit_nano_12_p16_224", 224)),
)


def make(name: str) -> nn.Module:
    """A network with random weights none of which hides a branch."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(normal * (parameter.numel() / parameter.shape[0]) ** -0.5)
            elif float(parameter.abs().max()) < 0.2:  # biases, layer scales, norms that start at zero
                parameter.copy_(0.3 * normal)
    return model.double().eval()


def free_share(model: nn.Module, groups: ChannelGroups) -> float:
    """The share of the parameters that lie in a slice of a free group."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    covered = {name: torch.zeros(one.shape, dtype=torch.bool) for name, one in parameters.items()}
    for member in (one for group in groups.free(inexact=True) for one in group.members if one.tensor in covered):
        covered[member.tensor].index_fill_(member.dim, member.index.flatten(), True)
    return sum(int(one.sum()) for one in covered.values()) / sum(one.numel() for one in covered.values())


def zeroed(model: nn.Module, groups: ChannelGroups, keep: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """What the dense network computes with zeros in what produces the dropped channels."""
    dense = copy.deepcopy(model)
    tensors = dict(dense.named_parameters(remove_duplicate=False)) | dict(dense.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for group in (one for one in groups if one.name in keep):
            gone = torch.ones(group.size, dtype=torch.bool)
            gone[keep[group.name]] = False
            for member in (one for one in group.members if one.produces):
                tensors[member.tensor].index_fill_(member.dim, member.index[gone].flatten(), 0.0)
        output: Tensor = dense(inputs)
    return output


def one_network(name: str, pixels: int) -> list[str]:
    """Plan, cut and compare; the cells of the table's row."""
    model = make(name)
    inputs = torch.randn(2, 3, pixels, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wall, processor = time.perf_counter(), time.process_time()
    groups = channel_groups(model, inputs)
    seconds = f"{time.perf_counter() - wall:.1f}", f"{time.process_time() - processor:.1f}"
    generator = torch.Generator().manual_seed(3)
    keep = {
        one.name: torch.randperm(one.size, generator=generator)[: max(1, one.size // 2)].sort().values
        for one in groups.free()
    }
    thin = cut(copy.deepcopy(model), inputs, keep=keep, groups=groups)
    with torch.no_grad():
        expected, got = zeroed(model, groups, keep, inputs), thin(inputs)
    worst = float((got - expected).abs().max() / expected.abs().max())
    free = f"{len(groups.free(inexact=True))} of {len(groups)}"
    return [name, str(pixels), *seconds, free, f"{free_share(model, groups):.3f}", f"{worst:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of networks; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="begin no network after that")
    options = parser.parse_args()
    try:
        import timm
    except ImportError:
        parser.exit(2, "This benchmark needs timm, which nothing else here does: pip install timm\n")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    columns = ("network", "pixels", "seconds", "processor", "free groups", "free share", "difference")
    table = Table(*columns, title=f"timm {timm.__version__}, torch {torch.__version__}, {options.threads} threads")
    known = dict(NETWORKS)
    begin, right = time.perf_counter(), 0
    for name in options.only or known:
        if time.perf_counter() - begin > 60 * options.minutes:
            break
        try:
            row = one_network(name, known.get(name, 224))
            right += float(row[-1]) < 1e-9
        except Exception as error:  # one row says so, and the others go on
            row = [name, str(known.get(name, 224)), "", "", "", "", f"{type(error).__name__}: {error}"[:60]]
        print(*row, flush=True)
        table.add_row(*row)
    console.print(table)
    console.print(f"{right} of {table.row_count} right")


if __name__ == "__main__":
    main()
