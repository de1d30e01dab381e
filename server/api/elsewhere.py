"""OpenAI's endpoints that this server does not have. They are 404s like any unknown path, with a sentence that says why."""

from __future__ import annotations

_ELSEWHERE = {
    "agents": "agents are not built",
    "assistants": "assistants are not built",
    "audio": "the model reads and writes text only",
    "batches": "there are no batch jobs; send the requests themselves, the server runs them together",
    "chat/completions": "chat completions are not stored",
    "chatkit": "sessions are not built",
    "completions": "completions are not stored",
    "containers": "code is not run here",
    "content_provenance_checks": "the model reads and writes text only",
    "conversations": "conversations are not stored; send the messages with each request",
    "decisions": "steering's decisions are in each answer; /v1/steering/score makes one alone",
    "edits": "OpenAI has retired it; use /v1/chat/completions",
    "embeddings": "the model generates text, and has no embeddings",
    "engines": "OpenAI has retired it; use /v1/models",
    "evals": "evaluations are not run here",
    "files": "files are not stored",
    "fine_tuning": "models are not trained here; `finesteer train` makes steering profiles",
    "images": "the model reads and writes text only",
    "live": "realtime sessions are not built; stream a chat completion",
    "moderations": "there is no moderation model; steering profiles do this server's part",
    "organization": "there are no accounts",
    "projects": "there are no accounts",
    "realtime": "realtime sessions are not built; stream a chat completion",
    "responses": "there is no such operation on responses",
    "safety": "cases are not built; steering profiles do this server's part",
    "skills": "skills are not built",
    "threads": "threads are not stored; send the messages with each request",
    "uploads": "files are not stored",
    "vaults": "secrets are not stored",
    "vector_stores": "files are not stored",
    "videos": "the model reads and writes text only",
    "webhook_endpoints": "nothing is called from here",
    "webhook_event_types": "nothing is called from here",
}


# Where OpenAI has an operation and this server an id.
OPERATIONS = ("/v1/responses/input_tokens", "/v1/responses/compact")


def why_not(path: str) -> str | None:
    """Why an unknown path of OpenAI's has nothing behind it; None for a path that is not OpenAI's either.

    To be asked of paths that no route has taken: some of the names have routes of their own beside them.
    """
    if not path.startswith("/v1/"):
        return None
    parts = path.removeprefix("/v1/").split("/")
    return _ELSEWHERE.get("/".join(parts[:2])) or _ELSEWHERE.get(parts[0])
