"""Uploads a pruned model with its card to the Hugging Face Hub; errors are one line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from pydantic import BaseModel

from ecoflap.errors import EcoflapError, HubError, InvalidOption
from ecoflap.report.card_page import README, with_repository
from ecoflap.report.upload import files_of, model_folder
from ecoflap.support.reading import checked

_NO_BRANCH = re.compile(r"^[-/.]|\.\.|//|/\.|@\{|[/.]$|\.lock$|^@$")
_MOST = 300  # characters of a server's or its client's message
LOG_IN = "log in with 'hf auth login', or set HF_TOKEN to a token that may write"


class _Token(BaseModel):
    role: str | None = None


class _Auth(BaseModel):
    accessToken: _Token | None = None


class _Account(BaseModel):
    """The fields of an account that are read here."""

    name: str
    auth: _Auth | None = None


def check_name(repo_id: str) -> str:
    """Return ``repo_id`` if the Hub accepts the name: "name" (in the own account) or "owner/name".

    Raises:
        InvalidOption: it does not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise InvalidOption(f"'{repo_id}' is no name of a repository, such as me/my-model: {reason}") from error
    return repo_id


def check_account() -> str:
    """The name of the account that is logged in at the Hub.

    Raises:
        HubError: there is no token, it is not accepted or may only read, or the Hub can't be reached.
    """
    with _explained("the Hub"):
        account = checked(HfApi().whoami(), _Account, "the answer of the Hub", HubError)
    token = account.auth and account.auth.accessToken
    if token and token.role == "read":
        raise HubError(f"the token of {account.name} may only read the Hub: {LOG_IN}")
    return str(account.name)


def _check_branch(name: str | None) -> None:
    """Raises InvalidOption for an invalid name of a git branch: empty, or with spaces, ".." or special characters."""
    if name is not None and not (re.fullmatch(r"[\w.+/@-]+", name, re.ASCII) and _NO_BRANCH.search(name) is None):
        raise InvalidOption(f"'{name}' is no name of a branch: take letters, digits, '-', '_', '.' and '/'")


def push(
    run: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, bars: bool = False
) -> str:
    """Upload a finished run's model, or a folder with a model, in one commit; only files that the Hub lacks are sent.

    The repository is created if necessary. The usage in the card loads ``repo_id`` afterwards.

    Args:
        run: a run directory, or a folder with config.json.
        repo_id: "owner/name", or "name" for the own account.
        private: make it private; otherwise it is public, or as the organisation's default.
        revision: the branch to upload to, created if necessary; default: the main one.
        bars: let the Hub's client show its progress on standard error.

    Returns:
        The address of the commit.

    Raises:
        InvalidOption: the name is invalid, the run is not finished, ``private`` is requested for a public repository,
            or the folder has files that must not be sent (:mod:`ecoflap.report.upload`).
        CheckpointError: the model's files are not complete.
        HubError: the Hub refuses or can't be reached.
    """
    check_name(repo_id)
    _check_branch(revision)
    folder = model_folder(Path(run))
    added = [(path.relative_to(folder).as_posix(), path) for path in files_of(folder)]
    check_account()
    api = HfApi()
    with _explained(repo_id), nullcontext() if bars else _without_bars():
        where = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(where.repo_id).private:
            raise InvalidOption(f"{where.repo_id} exists and is public: leave out --private, or choose another name")
        if revision is not None:
            api.create_branch(where.repo_id, branch=revision, exist_ok=True)
        files = [CommitOperationAdd(name, _content(path, folder, where.repo_id)) for name, path in added]
        done = api.create_commit(
            where.repo_id, files, commit_message="Upload a model pruned with ecoflap", revision=revision
        )
    return str(done.commit_url)


def later(run: str | Path, repo_id: str, *, private: bool = False) -> str:
    """The command that uploads a run later."""
    return shlex.join(["ecoflap", "push", str(run), repo_id, *(["--private"] if private else [])])


def _content(path: Path, folder: Path, repo_id: str) -> Path | bytes:
    if path != folder / README:
        return path
    return with_repository(path.read_text("utf-8", errors="replace"), repo_id).encode()


@contextmanager
def _without_bars() -> Iterator[None]:
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Context that turns errors of the Hub's client into HubError with a remedy."""
    try:
        yield
    except EcoflapError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"no token for the Hub was found: {LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub is not asked, since HF_HUB_OFFLINE is set: unset it") from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(error, what)) from error
    except Exception as error:  # of the HTTP client in use: no network, a broken connection, no such name
        inner = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(inner, HfHubHTTPError):
            raise HubError(_refusal(inner, what)) from error
        if isinstance(inner, OSError) and inner.filename is not None:
            raise  # a file of the model, not the network
        reason = _short(str(inner)) or type(inner).__name__
        raise HubError(f"the Hub at {huggingface_hub.constants.ENDPOINT} can't be reached ({reason})") from error


def _refusal(error: HfHubHTTPError, what: str) -> str:
    status = error.response.status_code
    said = _answer_of_server(error)
    if status == 401:
        return f"the Hub does not accept the token: {LOG_IN}"
    if status == 403:
        return f"the token may not write to {what}{said}: {LOG_IN}"
    if status == 404:
        return f"the Hub has no {what}, or the token may not see it{said}: check the name, and {LOG_IN}"
    return f"the Hub refused {what} with {status}{said}"


def _answer_of_server(error: HfHubHTTPError) -> str:
    """The server's message in brackets, if there is one."""
    words = error.server_message
    if not words:
        try:
            words = json.loads(error.response.text).get("error", "")
        except (ValueError, AttributeError):
            words = ""
    return f" ({_short(str(words))})" if words else ""


def _short(words: str) -> str:
    """One line of at most :data:`_MOST` characters, without the token, which a message may contain."""
    token = (get_token() or "").strip()
    plain = " ".join((words.replace(token, "(the token)") if token else words).split())
    return plain if len(plain) <= _MOST else plain[: _MOST - 1] + "…"
