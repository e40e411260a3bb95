"""Network compression for people who already train with Lightning."""

from pathlib import Path as _Path

from lightning_compress.binary.callback import BinaryWeightsCallback
from lightning_compress.block_pruning.callback import BlockPruningCallback
from lightning_compress.block_pruning.prune import prune_blocks
from lightning_compress.channel_gates.module import ChannelGates
from lightning_compress.channels.cut import cut, shrink
from lightning_compress.channels.find import ChannelGroup, ChannelGroups, channel_groups
from lightning_compress.clustering.callback import WeightClusteringCallback
from lightning_compress.coding import CompressedSize, CorruptFileError, load_compressed, save_compressed
from lightning_compress.coding.footprint import footprint
from lightning_compress.conv_substitution.callback import ConvSubstitutionCallback
from lightning_compress.conv_substitution.substitute import substitute_convs
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.early_exit.module import EarlyExitHeads
from lightning_compress.group_lasso.callback import GroupLassoCallback
from lightning_compress.low_rank.callback import LowRankCallback
from lightning_compress.low_rank.nuclear_callback import NuclearNormCallback
from lightning_compress.low_rank.replace import lower_rank
from lightning_compress.measure.footprint import Footprint
from lightning_compress.pruning.callback import IterativePruningCallback
from lightning_compress.pruning.tickets import LotteryTicketCallback
from lightning_compress.quantization.callback import QuantizationAwareTrainingCallback
from lightning_compress.scratch.callback import ScratchCallback
from lightning_compress.serving.controller import BudgetController
from lightning_compress.skipping.module import SkippableBlocks
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.supermask.callback import SupermaskCallback

__all__ = [
    "BinaryWeightsCallback",
    "BlockPruningCallback",
    "BudgetController",
    "ChannelGates",
    "ChannelGroup",
    "ChannelGroups",
    "CompressedSize",
    "ConvSubstitutionCallback",
    "CorruptFileError",
    "DistillationModule",
    "EarlyExitHeads",
    "Footprint",
    "GroupLassoCallback",
    "IterativePruningCallback",
    "LotteryTicketCallback",
    "LowRankCallback",
    "NuclearNormCallback",
    "QuantizationAwareTrainingCallback",
    "ScratchCallback",
    "SkippableBlocks",
    "SlimmableWidth",
    "SupermaskCallback",
    "WeightClusteringCallback",
    "channel_groups",
    "cut",
    "footprint",
    "load_compressed",
    "lower_rank",
    "prune_blocks",
    "save_compressed",
    "shrink",
    "substitute_convs",
]
__version__ = "0.1.0"

_here = _Path(__file__).parent
if not (_here / "conf").is_dir():  # an editable install: the wheel has conf/ in here, the repository beside
    __path__.append(str(_here.parent))
