"""Parameters of the pyramid backbone by part; a model on the meta device will do."""

from collections import Counter

from torch import nn

from m4v_dist.blocks.lora import is_adapter

PARTS = (
    "embedders",
    "double blocks",
    "unified: modulation",
    "unified: attention",
    "unified: ssm",
    "unified: registers",
    "unified: temporal branch",
    "unified: feed-forward and out",
    "out",
    "adapters",
)


def parameters_by_part(model: nn.Module) -> Counter[str]:
    """Count parameters; keys are `PARTS`, and what a model does not have is 0.

    Raises:
        ValueError: a parameter that belongs to no part.
    """
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counted[_part(name)] += parameter.numel()
    return counted


def _part(name: str) -> str:
    words = name.split(".")
    if is_adapter(name):
        return "adapters"
    match words[0]:
        case "conditioning" | "text_in" | "video_in":
            return "embedders"
        case "double_blocks":
            return "double blocks"
        case "modulation_out" | "video_out":
            return "out"
        case "single_blocks":
            return f"unified: {_unified_part(name, words[2], set(words[3:]))}"
    raise ValueError(f"parameters_by_part: {name} belongs to no part; name one in model/parameters.py.")


def _unified_part(name: str, module: str, below: set[str]) -> str:
    match module:
        case "modulation":
            return "modulation"
        case "temporal_branch":
            return "temporal branch"
        case "proj_mlp" | "proj_out":
            return "feed-forward and out"
        case "mixer":
            # Of a mixer's own words: a parallel one holds both, "attention.qkv" and "ssm.ssm" with its registers.
            for word, part in (("registers", "registers"), ("ssm", "ssm"), ("qkv", "attention")):
                if word in below:
                    return part
    raise ValueError(f"parameters_by_part: {name} belongs to no part; name one in model/parameters.py.")
