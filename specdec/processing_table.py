"""How each logits processor must be called, so that a packed row gets what HF's own loop would give it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor


class Kind(StrEnum):
    """What the result for one row depends on."""

    NO_IDS = "no-ids"  # the row's logits alone
    ROW_WISE = "row-wise"  # the row's logits and text
    INDEXED = "indexed"  # and which request of the batch it belongs to
    PREFIX = "prefix"  # INDEXED, through a function of (batch index, text)
    STATEFUL = "stateful"  # and the calls before
    UNSUPPORTED = "unsupported"  # not a causal LM's processor: doubled batches, channels


_NO_IDS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
)
_ROW_WISE = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
    "WatermarkLogitsProcessor",
)
_INDEXED = ("EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor")
_PREFIX = ("PrefixConstrainedLogitsProcessor",)
_STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperNoSpeechDetection",
)
_UNSUPPORTED = (
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
)

# By name, since the supported versions of transformers do not all have all of them.
BUILT_IN: dict[str, Kind] = {
    **dict.fromkeys(_NO_IDS, Kind.NO_IDS),
    **dict.fromkeys(_ROW_WISE, Kind.ROW_WISE),
    **dict.fromkeys(_INDEXED, Kind.INDEXED),
    **dict.fromkeys(_PREFIX, Kind.PREFIX),
    **dict.fromkeys(_STATEFUL, Kind.STATEFUL),
    **dict.fromkeys(_UNSUPPORTED, Kind.UNSUPPORTED),
}


def kind_of(processor: LogitsProcessor) -> Kind:
    """The table's kind for a class of transformers itself; any other processor is pure per row, batch index included.

    An attribute `stateful = True` on a user's processor says that it is not; see `is_silent`.
    """
    if getattr(processor, "stateful", False):
        return Kind.STATEFUL
    cls = type(processor)
    if not cls.__module__.startswith("transformers."):
        return Kind.INDEXED
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        return Kind.INDEXED
    return BUILT_IN.get(cls.__name__, Kind.INDEXED)


def is_silent(processor: LogitsProcessor) -> bool:
    """Whether it is a user's own and does not say by an attribute `stateful`, True or False, whether it keeps state."""
    return not type(processor).__module__.startswith("transformers.") and not hasattr(processor, "stateful")


def state_of(value: Any, depth: int = 4) -> Any:
    """Something that is equal as long as nothing was set, added or written in place, as far as that can be seen from Python.

    Containers and attributes are followed `depth` deep. Tensors count by identity and version, so nothing is read from a device;
    what is neither, such as a matcher written in another language, counts by identity.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if depth > 0 and isinstance(value, Mapping):
        return id(value), tuple((state_of(k, depth - 1), state_of(v, depth - 1)) for k, v in value.items())
    if depth > 0 and isinstance(value, (list, tuple, set, frozenset, deque)):
        return id(value), tuple(state_of(v, depth - 1) for v in value)
    if depth > 0 and hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, FunctionType, nn.Module)):
        return id(value), tuple((k, state_of(v, depth - 1)) for k, v in vars(value).items())
    return id(value)
