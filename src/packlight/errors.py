"""The errors a user can meet. Each message says what is wrong, where, and what to do about it."""


class PacklightError(Exception):
    """Something the user can put right. The command line prints the message and exits with status 2."""


class ModelError(PacklightError):
    """The model can't be found, read, or handled."""


class DataError(PacklightError):
    """The samples can't be found, read, or used for what was asked."""


class TargetError(PacklightError):
    """The target is not written in units we know, contradicts itself, or can't be measured."""


class PlanError(PacklightError):
    """The plan does not fit the model, or its file is damaged."""


class BundleError(PacklightError):
    """The folder is no bundle, or not the bundle it claims to be."""


class RuntimeMissing(PacklightError):  # noqa: N818 - it names what is missing
    """A package that this step needs is not installed. The message holds the line that installs it."""
