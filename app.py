"""For `uvicorn app:app`: the application with its settings from the environment."""

from session_sidecar.app import create_app
from session_sidecar.settings import Settings

app = create_app(Settings.load())
