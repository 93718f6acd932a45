"""Moving house: what a home holds goes into PostgreSQL (`into`), or what is there into a new home (`out`).

A thread is mapped at the new place once its transcript is there and was compared by hashes: whoever is killed and
begins again goes on where it was, and nobody meets a thread without its history meanwhile. The old place stays as it
is. Mappings and transcripts are moved, and nothing else: no workspace, no settings, no login.
"""
