"""Pushing a model to the Hub in one commit, with its model card."""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.report import plain_json
from ..environment import SECRET
from .card import Run, card_images, make_card, merge_cards
from .retry import load_with_retries, with_retries

# The files of a model. Logs, training checkpoints and whatever else a run's folder holds are not pushed.
SHIPPED = re.compile(
    r"(config|generation_config|processor_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|confidence|vocab|model\.safetensors\.index)\.json|merges\.txt|chat_template\.jinja|"
    r"(\w+_clip_phi|backbones)\.py|model(-\d+-of-\d+)?\.safetensors|adapter/adapter_(config\.json|model\.safetensors)"
)
CARD_IMAGES = re.compile(r"curve\.png|samples/\d+\.jpg")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TOKENS = "https://huggingface.co/settings/tokens"


@dataclass
class Pushed:
    repo_id: str
    url: str
    commit: str  # the head of the branch
    changed: bool  # whether the push made it
    revision: str  # what to load
    pull_request: str | None = None

    def __str__(self) -> str:
        if self.pull_request:
            return f"offered as {self.pull_request}"
        done = "pushed to" if self.changed else "nothing has changed at"
        return f"{done} {self.url}, commit {self.commit[:12]}; load it with revision={self.revision!r}"


def push(
    folder: str | Path, repo_id: str, *, private: bool | None = None, branch: str | None = None, tag: str | None = None,
    create_pr: bool = False, merged: bool = False, message: str | None = None, images: bool = True,
) -> Pushed:  # fmt: skip
    """Push the model in a folder, with a model card made from the files of its run.

    All files come in one commit. The card is merged into the one in the repository. Files of an earlier push that this
    model does not have are deleted; other files stay. The same push again makes no commit.

    Args:
        folder, repo_id: of a training run or a saved model; user/name, or a name of the token's user.
        branch, tag: None for main; of the commit, None for a name made from the hash of the weights.
        create_pr: open a pull request, or continue one of the same title.
        merged: push all weights, LoRA folded in, instead of the delta that training saved.
        images: show the run's held-out sample images in the card.

    Raises ValueError or OSError, in one line, if it cannot be pushed. The repository is then as it was."""
    folder = Path(folder)
    if tag and create_pr:
        raise ValueError("--tag names a commit, and a pull request has none yet: tag it after it is merged")
    run = read_run(folder)
    refuse_local_backbones(folder, run.config, merged)
    all_weights = merged or not run.config["delta"]
    api, user, repo_id = _check_access(repo_id, create_pr)
    with tempfile.TemporaryDirectory(prefix="clip-phi-push-") as temporary:
        stage = Path(temporary)
        stage_files(folder, stage, run, merged)
        if not create_pr or repo_id.startswith(f"{user}/"):
            with_retries(f"creating {repo_id}", partial(api.create_repo, repo_id, private=private, exist_ok=True))
        if tag is not None:
            refs = with_retries(f"reading the tags of {repo_id}", lambda: api.list_repo_refs(repo_id))
            heads = [each.target_commit for each in refs.branches if each.name == (branch or "main")]
            if at := [each.target_commit for each in refs.tags if each.name == tag and each.target_commit not in heads]:
                why = "since others may have pinned that one"
                raise ValueError(f"{repo_id} already has a tag {tag}, at {at[0][:12]}: choose another --tag, {why}")
        if branch is not None and not create_pr:
            with_retries(f"creating branch {branch}", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        shown = {name: data for name, data in card_images(run).items() if images or not name.startswith("samples/")}
        files: dict[str, Any] = {name: str(stage / name) for name in _relative(stage)} | shown
        additions = {name: CommitOperationAdd(name, files[name]) for name in sorted(files)}
        hashes = [each.upload_info.sha256.hex() for name, each in additions.items() if name.endswith(".safetensors")]
        # the card names it before the commit exists
        tag_name = tag or f"weights-{hashlib.sha256(''.join(sorted(hashes)).encode()).hexdigest()[:12]}"
        revision = "main" if create_pr else tag_name
        backbones = [run.config.get(f"{part}_backbone") for part in ("vision", "text")]
        licenses = {name: _license(api, name) for name in backbones if name and not Path(name).is_absolute()}
        card = make_card(run, repo_id, revision, all_weights, shown, licenses)
        title = message or ("Merged checkpoint" if all_weights else "Delta checkpoint")
        commit = partial(_commit, api, repo_id, branch or "main", user if create_pr else None, title, additions, card)
        commit_id, changed, url = with_retries(f"the commit to {repo_id}", commit)
    if not create_pr:
        _tag(api, repo_id, tag_name, commit_id, explicit=tag is not None)
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", commit_id, changed, revision, url)


def check_push(repo_id: str, config: dict[str, Any], merged: bool, folder: str | Path) -> None:
    """Raises ValueError or OSError if a model of this config cannot be pushed later. Called before training."""
    refuse_local_backbones(Path(folder), config, merged)
    _check_access(repo_id)


def _check_access(repo_id: str, create_pr: bool = False) -> tuple[HfApi, str, str]:
    """The Hub with the rights of the token, its user, and the full repo id.

    Raises ValueError or OSError, in one line, if the token has no right to write there."""
    if is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if (token := get_token()) is None:
        way_out = f"run 'hf auth login', or set HF_TOKEN; {TOKENS} creates one (with write access)"
        raise ValueError(f"no token for the Hub: {way_out}")
    api = HfApi(token=token, library_name="clip-phi")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: it is user/name, such as alice/clip-phi") from error
    me = with_retries("checking the token", api.whoami)
    name = me["name"]
    namespace, _, repository = (repo_id if "/" in repo_id else f"{name}/{repo_id}").rpartition("/")
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        way_out = f"create one with write access at {TOKENS}, then run 'hf auth login'"
        raise ValueError(f"{name}'s token may only read: {way_out}")
    orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if not create_pr and namespace not in (name, *orgs):
        has = f"it has {', '.join([name, *sorted(orgs)])}"
        way_out = f"push to {name}/{repository}, or offer it with --create_pr"
        raise ValueError(f"{namespace} is not a namespace of this token ({has}): {way_out}")
    if not create_pr and orgs.get(namespace) == "read":
        raise ValueError(f"{name} may read in {namespace} and not write: ask its owners, or give --create_pr")
    return api, name, f"{namespace}/{repository}"


def read_run(folder: Path) -> Run:
    """Raises ValueError if the folder has no Clip-Phi model in safetensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} contains no model (no config.json): give the --output_dir of a training run")
    run = Run.read(folder)
    if run.config.get("model_type") != "clip_phi":
        raise ValueError(f"{folder} contains a {run.config.get('model_type')!r} model, not a 'clip_phi' one")
    run.config.setdefault("delta", False)
    if not list(folder.glob("model*.safetensors")):
        if pickles := [path for path in folder.iterdir() if path.suffix in PICKLES]:
            why = "is a pickle, which can run any code when it is opened, and is never pushed"
            raise ValueError(f"{pickles[0]} {why}: save the model with save_pretrained, which writes safetensors")
        raise ValueError(f"{folder} contains no weights (no model.safetensors)")
    return run


def refuse_local_backbones(folder: Path, config: dict[str, Any], merged: bool) -> None:
    """Raises ValueError for a delta whose backbones are not on the Hub."""
    local = [f"{part}_backbone" for part in ("vision", "text") if not config.get(f"{part}_backbone_revision")]
    if config["delta"] and not merged and local:
        what = f"{folder} is a delta on {config.get(local[0])}, a local folder that nobody else has"
        raise ValueError(f"{what}: push all weights with --merged, or train on backbones of the Hub")


def stage_files(folder: Path, place: Path, run: Run, merged: bool) -> None:
    """Put the files to push into `place`: those of the model alone, without local paths.

    Raises ValueError if a local path or an access token is left in one of them."""
    merge = merged and run.config["delta"]
    if merge:
        from transformers.utils import logging

        from modeling_clip_phi import ClipPhiForCausalLM

        logging.disable_progress_bar()
        load_with_retries(ClipPhiForCausalLM.from_pretrained, folder).save_pretrained(place, merged=True)
    for name in _relative(folder):
        is_merged = merge and name.startswith(("model.", "model-", "adapter/"))  # the delta's
        if SHIPPED.fullmatch(name) and not is_merged and not (place / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                (place / name).symlink_to((folder / name).resolve())
            else:
                shutil.copyfile(folder / name, place / name)
    private = {str(path) for path in (Path.home(), Path.cwd(), folder.resolve().parent) if len(path.parts) > 1}
    for path in map(place.joinpath, _relative(place)):
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json" and path.name != "tokenizer.json":
                cleaned = json.loads(text, object_pairs_hook=_without_local_names)
                if cleaned != json.loads(text):
                    text = plain_json(cleaned, indent=2) + "\n"
                    path.write_text(text, encoding="utf-8")
            if found := [each for each in private if f"{each}/" in text] or SECRET.findall(text):
                what = found[0] if found[0].startswith("/") else "an access token"
                file = folder / path.relative_to(place)
                raise ValueError(f"{file} contains {what}, which must not be pushed: remove it")


def _without_local_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a json file without names of local folders; Hub ids stay."""
    local = {name for name, value in pairs if name.endswith("name_or_path") and not _is_hub_id(value)}
    kept = {name: value for name, value in pairs if name not in local | {"is_local", "local_files_only"}}
    return kept | {name: None for name, value in pairs if name.endswith("_backbone") and not _is_hub_id(value)}


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", value)) and not Path(value).exists()


def _commit(
    api: HfApi, repo_id: str, branch: str, author: str | None, title: str, additions: dict[str, Any], card: str
) -> tuple[str, bool, str | None]:
    """One try of the commit: it reads the repository, and is refused (412) if that changes before the commit is made.

    author: of a pull request to open, or to continue if it is open already; None for a commit to the branch. Returns
    the commit, whether it is new, and the URL of the pull request."""
    opened = None
    if author is not None:
        found = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        opened = next((each.num for each in found if (each.author, each.title) == (author, title)), None)
    at = f"refs/pr/{opened}" if opened else branch
    info = api.model_info(repo_id, revision=at)
    held = {sibling.rfilename for sibling in info.siblings or []}
    old = None
    if "README.md" in held:
        with tempfile.TemporaryDirectory() as cache:
            path = api.hf_hub_download(repo_id, "README.md", revision=info.sha, cache_dir=cache)
            old = Path(path).read_bytes().decode("utf-8")
    stale = [name for name in sorted(held - set(additions)) if SHIPPED.fullmatch(name) or CARD_IMAGES.fullmatch(name)]
    operations = [CommitOperationAdd("README.md", merge_cards(old, card).encode()), *additions.values()]
    operations += [CommitOperationDelete(name) for name in stale]
    options = {"revision": at, "parent_commit": info.sha, "create_pr": author is not None and opened is None}
    done = api.create_commit(repo_id, operations, commit_message=title, **options)
    url = done.pr_url or (f"{api.endpoint}/{repo_id}/discussions/{opened}" if opened else None)
    return done.oid, done.oid != info.sha, url


def _tag(api: HfApi, repo_id: str, tag: str, commit: str, explicit: bool) -> None:
    what = f"the tag {tag} of {repo_id}"
    try:
        with_retries(what, lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"pushed as {commit[:12]}, which stays, but without the tag {tag}: {error}") from error
    if explicit:  # the other one may name an earlier commit of the same weights
        refs = with_retries(what, lambda: api.list_repo_refs(repo_id))
        if {each.name: each.target_commit for each in refs.tags}[tag] != commit:
            raise ValueError(f"pushed as {commit[:12]}, but {tag} names an earlier commit: push with another --tag")


def _license(api: HfApi, backbone: str) -> str | None:
    """What the backbone's own card states."""
    try:
        info = with_retries(f"the license of {backbone}", lambda: api.model_info(backbone))
    except (OSError, ValueError):
        return None
    return info.card_data.license if info.card_data else None


def _relative(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
