"""Settings of the environment: how loopback addresses are reached, and Prefect's settings for Pusa.

They must be set before Prefect and httpx, its HTTP client, are imported.
"""

import importlib
import io
import os
import tomllib
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import ValidationError

from flows.console import show
from pusa.errors import PusaError
from pusa.system.text import first_line

HEARTBEAT_SECONDS = 30  # the shortest that Prefect allows
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A fresh machine migrates its database first, which takes longer than Prefect's limit of 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pusa",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # When they cease, the automation of `pusa deploy` marks the run as crashed.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    # A deployment may choose to persist results; they are never pickles.
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # The server's pages ask the server that they came from, also where it has another port.
    "PREFECT_SERVER_UI_API_URL": "/api",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104  the last one as a client's address
WITHOUT = "or use --no-prefect"


def set_defaults() -> None:
    """Set the environment variables that are not set yet."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def reach_loopback_directly(environment: MutableMapping[str, str]) -> None:
    """Add the loopback addresses to NO_PROXY and no_proxy, so that no proxy is asked for a server on this machine.

    Where both are set, programs read the second; where one is set, it counts for both.
    """
    upper, lower = environment.get("NO_PROXY"), environment.get("no_proxy")
    for name, value in (("NO_PROXY", upper or lower), ("no_proxy", upper if lower is None else lower)):
        hosts = [host.strip() for host in (value or "").split(",") if host.strip()]
        if "*" not in hosts:
            hosts += [host for host in LOOPBACK if host not in hosts]
        environment[name] = ",".join(hosts)


def load_prefect() -> None:
    """Import Prefect with Pusa's defaults, so that it reads its settings and shows our log lines.

    Raises:
        PusaError: Prefect refuses a setting, cannot read a file of settings or lacks the profile that is named, or the
            current folder has settings.
    """
    require_no_settings_in(Path.cwd())
    set_defaults()
    printed = io.StringIO()  # Prefect's own words about a setting that it refuses: ours replace them
    try:
        with redirect_stderr(printed), warnings.catch_warnings():
            # That the home cannot be made is an error only where a server needs it.
            warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
            importlib.import_module("prefect.context")
    except ValidationError as error:
        problem = _describe(error.title, error.errors()[0])
        raise PusaError(f"Prefect refuses a setting: {problem}; correct it, {WITHOUT}") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the file does not have the form of profiles
        home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
        profiles = os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml"
        raise PusaError(
            f"Prefect cannot read settings: {first_line(error)}; they are in {profiles}; correct them, {WITHOUT}"
        ) from error
    _require_known_profile()
    if words := printed.getvalue().rstrip("\n"):
        show(words, error=True)
    importlib.import_module("prefect.main")  # sets the logging up, to the stderr of now


def _require_known_profile() -> None:
    """Raise PusaError if the profile that is named does not exist: Prefect would take its own one, of no server."""
    profiles = importlib.import_module("prefect.settings").load_profiles()
    named = os.environ.get("PREFECT_PROFILE")
    if (name := profiles.active_name if named is None else named) not in profiles.names:
        where = "the file of profiles" if named is None else "PREFECT_PROFILE"
        known = ", ".join(sorted(profiles.names))
        raise PusaError(f"Prefect has no profile {name!r}, which {where} names; it has {known}: correct it, {WITHOUT}")


def require_no_settings_in(folder: Path) -> None:
    """Refuse a current folder with settings of Prefect: it may be a stranger's, such as that of a downloaded model.

    Settings can name the server that is sent everything, and code: a logging configuration calls what it names.

    Raises:
        PusaError: it has some, or a file that only looks like one of settings; the message says where else to set them.
    """
    for name, has_settings in SETTINGS_FILES.items():
        file = folder / name
        try:
            found = os.path.lexists(file) and (not file.is_file() or has_settings(file))
        except (OSError, ValueError):  # it cannot be read; Prefect would say so in a longer way
            found = True
        if found:
            raise PusaError(
                f"Prefect would take settings from {file}, which can name a server and code to run; set them as "
                f"PREFECT_... in the environment or in a profile of Prefect, start in another folder, {WITHOUT}"
            )


def _dotenv_has_settings(file: Path) -> bool:
    return any(name.lower().startswith("prefect_") for name in dotenv_values(file, interpolate=False))


def _pyproject_has_settings(file: Path) -> bool:
    tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool")
    return isinstance(tool, dict) and "prefect" in tool


# The files of the current folder from which Prefect reads settings.
SETTINGS_FILES: Mapping[str, Callable[[Path], bool]] = {
    ".env": _dotenv_has_settings,
    "prefect.toml": Path.exists,
    "pyproject.toml": _pyproject_has_settings,
}


def _describe(title: str, problem: Mapping[str, Any]) -> str:
    """Describe what is wrong with a setting, by the environment variable that has its value if there is one."""
    key, value = ".".join(map(str, problem["loc"])), problem["input"]
    variables = [
        name
        for name, text in os.environ.items()
        if name.upper().startswith("PREFECT_")
        and name.upper().endswith(key.rpartition(".")[2].upper())
        and text.upper() == str(value).upper()
    ]
    name = variables[0] if variables else f"{key} of {title} (from a profile)"
    return f"{name}={value!s:.80}: {problem['msg']}"
