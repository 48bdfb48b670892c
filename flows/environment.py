"""What Prefect must be told before it is imported; a setting that is there already wins."""

import os

SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A fresh machine migrates its database first, which takes longer than the 20 s that Prefect waits.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pusa",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # Whatever a deployment chooses to persist is never a pickle.
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # The dashboard asks the server it came from, also on another port.
    "PREFECT_SERVER_UI_API_URL": "/api",
}


def prepare() -> None:
    """Set what is unset."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
