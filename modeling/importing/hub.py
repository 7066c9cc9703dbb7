"""Model repositories on a Hugging Face hub, through its own client: cache, token, endpoint and offline mode are its."""

import fnmatch
import re
from pathlib import Path

from modeling.importing.source import BESIDE, INDEX, PICKLES, SUFFIXES, choose, shard_names

REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w.-]{1,96}")


def is_repository(source: str) -> bool:
    """Whether a source that is not on disk can be a repository's id, ``owner/name``, or a file of one."""
    repository, file = split(source)
    if file is not None:
        # A path with a mistake in it, if it begins in a folder that is here.
        return file.endswith(SUFFIXES) and not Path(repository.partition("/")[0]).exists()
    return bool(REPOSITORY.fullmatch(source)) and not source.endswith((".safetensors", ".json", *PICKLES))


def split(source: str) -> tuple[str, str | None]:
    """``owner/name/FILE`` as repository and file; the file is None where the source has no such three parts."""
    repository, _, file = source.rpartition("/")
    return (repository, file) if file and REPOSITORY.fullmatch(repository) else (source, None)


def fetch(source: str, revision: str | None) -> Path:
    """Fetches what an import needs of a repository, and nothing else, into the client's cache.

    Without a network, or in offline mode (HF_HUB_OFFLINE=1), the cached files are taken.

    Args:
        source: ``owner/name``, or ``owner/name/FILE`` to choose among several weight files.

    Returns:
        the folder with the files, or the chosen file.

    Raises:
        ValueError: no such repository, file or revision, no permission, or no network and no cache.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What its HTTP client raises: the client's package has changed between versions.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    repository, file = split(source)
    at = f"{repository}{'' if revision is None else f' (revision {revision})'}"
    try:
        try:
            info = HfApi().model_info(repository, revision=revision)
        except (OfflineModeIsEnabled, http_error) as e:
            if isinstance(e, HfHubHTTPError):  # it did answer
                raise
            cached = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
            return Path(cached, file or "")
        names = [file.rfilename for file in info.siblings or []]
        weights = file or choose([name for name in names if "/" not in name], repository)
        if weights not in names:
            raise ValueError(f"{at} has no file {weights}; it has {', '.join(n for n in names if '/' not in n)[:500]}")
        wanted = [weights, *(name for name in BESIDE if name in names)]
        if weights.endswith(INDEX):
            wanted += shard_names(Path(hf_hub_download(repository, weights, revision=revision)))
        folder = snapshot_download(repository, revision=revision, allow_patterns=[_literal(n) for n in wanted])
        return Path(folder, file or "")
    except GatedRepoError:
        reason = "access is granted by its owner: ask for it on the repository's page, then set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = (
            "there is no such repository, or it is private and the token does not open it: check the name, or set "
            "HF_TOKEN (or log in with `hf auth login`)"
        )
    except RevisionNotFoundError:
        reason = "the repository has no such revision: --revision takes a branch, a tag or a commit"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: fetch it once without"
        else:
            reason = (
                f"{constants.ENDPOINT} does not answer and the repository is not in the cache; is there a network, and "
                "is HF_ENDPOINT right? A file or folder on disk is read as it is: check the path if you meant one"
            )
    except HFValidationError as e:
        reason = str(e)
    except EntryNotFoundError as e:
        reason = f"a file is missing in it ({' '.join(str(e).split())[:200]})"
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        reason = f"the hub answers with status {status}: " + (
            "set HF_TOKEN (or log in with `hf auth login`) to a token that may read it"
            if status in (401, 403)
            else "try again later"
        )
    except http_error as e:
        reason = f"the connection to {constants.ENDPOINT} failed ({type(e).__name__}): try again"
    except Exception as e:  # of the client's own helpers, and of answers that are not the hub's
        if type(e) is ValueError or isinstance(e, OSError):
            raise
        reason = f"its client fails with {type(e).__name__} ({' '.join(str(e).split())[:200]}): try again"
    raise ValueError(f"cannot fetch {at} from the hub: {reason}")


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    pattern = re.sub(r"([*?[])", r"[\1]", name)
    assert fnmatch.fnmatch(name, pattern)
    return pattern
