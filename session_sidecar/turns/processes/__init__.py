"""The processes that turns take, those made ready for a hint, and who is at which thread."""
