"""Passwords in addresses: what is set is recorded, logged and shown, so it must hold none."""

import re

from onelabel.errors import ConfigError

# Keys of S3 may hold slashes.
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]*@|(?<=s3://)[^/@\s:]*:[^?@\s]*@")
_PASSWORD = re.compile(r"//[^/@\s:]*:[^/@\s]*@|s3://[^/@\s:]*:[^?@\s]*@")
_NAMED = re.compile(r"(?<=[?&])([\w-]*(?:password|passwd|secret|token)[\w-]*|pwd|sig)=[^&#\s]+", re.IGNORECASE)


def without_password(text: str, /) -> str:
    """A text in which the URLs hold no credentials."""
    return _NAMED.sub(r"\1=...", _CREDENTIALS.sub("", text))


def has_password(text: str, /) -> bool:
    """Whether a text holds a URL such as s3://KEY:SECRET@bucket, or HOST/DB?password=SECRET."""
    return bool(_PASSWORD.search(text) or _NAMED.search(text))


def refuse_passwords(settings: object, key: str = "") -> None:
    """Look through a nested mapping.

    Raises
    ------
    ConfigError : naming the key.
    """
    if isinstance(settings, dict | list | tuple):
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for name, part in items:
            refuse_passwords(part, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, str) and has_password(settings):
        raise ConfigError(
            f"config key '{key}' = '{without_password(settings)}' holds a password, which would be recorded; give it in"
            " the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, PGPASSWORD"
        )
