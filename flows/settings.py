"""Prefect's settings for Pusa. They must be in the environment before Prefect is imported."""

import os

SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A fresh machine migrates its database first, which takes longer than Prefect's limit of 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pusa",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # A deployment may choose to persist results; they are never pickles.
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # The dashboard asks the server that it came from, also where that server has another port.
    "PREFECT_SERVER_UI_API_URL": "/api",
}


def set_defaults() -> None:
    """Set the environment variables that are not set yet."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
