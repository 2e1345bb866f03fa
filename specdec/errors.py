"""Errors a user can cause. Each message says what came, what is allowed and what to do."""


class SpecDecError(ValueError):
    """Base of every error that specdec raises for something a user can mend."""


class UnsupportedModelError(SpecDecError):
    """The model cannot be run by this runtime: its state cannot be rolled back, or it ignores our attention."""


class VocabularyMismatchError(SpecDecError):
    """Draft and target do not share one vocabulary."""


class IncompatibleRuleError(SpecDecError):
    """A verification rule was paired with a draft whose law it cannot verify."""


class InvalidRequestError(SpecDecError):
    """An argument or prompt of `generate` that cannot be served as asked."""


class CheckpointError(SpecDecError):
    """A path that is missing, is not a checkpoint, or holds no safetensors weights."""


class NonFiniteLogitsError(SpecDecError):
    """The target produced NaN for a token that was about to be chosen."""


class OutOfCacheError(SpecDecError):
    """The keys and values of a call do not fit in memory; found out before it decodes."""
