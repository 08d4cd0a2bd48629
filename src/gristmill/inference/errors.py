"""The error for a request that the engine refuses: it names the setting at fault, so an API can name it too."""

from gristmill.errors import InputError


class SettingError(InputError):
    """Bad input in one setting of a request. setting: its name in `Request` or `Sampling`. code: for programs."""

    def __init__(self, setting: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.setting, self.code = setting, code
