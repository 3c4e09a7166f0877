"""Pushing a run to the Hub: one commit that is whole, tried again where the network or the Hub fails for a while."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..environment import SECRET
from .card import Run, make_card, make_pictures, merge_cards, weights_name
from .retry import Result, with_retries

# What a checkpoint consists of; all else in a run's folder (logs, checkpoints to go on from) stays there.
SHIPPED = re.compile(
    r"(config|generation_config|processor_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|"
    r"added_tokens|vocab|model\.safetensors\.index)\.json|merges\.txt|chat_template\.jinja|(\w+_clip_phi|backbones)\.py|"
    r"model(-\d+-of-\d+)?\.safetensors|adapter/adapter_(config\.json|model\.safetensors)"
)
PICTURES = re.compile(r"curve\.png|samples/\d+\.jpg")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass
class Pushed:
    """commit: what the branch stands at now. changed: whether the push made that commit. revision: what to load."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    revision: str
    pull_request: str | None = None

    def __str__(self) -> str:
        if self.pull_request:
            return f"offered as {self.pull_request}"
        done = "pushed to" if self.changed else "nothing has changed at"
        return f"{done} {self.url}, commit {self.commit[:12]}; load it with revision={self.revision!r}"


@dataclass
class Target:
    """Where a push goes. branch: None for the main one. tag: None for one that is named after the weights."""

    repo_id: str
    private: bool | None = None
    branch: str | None = None
    tag: str | None = None
    create_pr: bool = False


class Hub:
    """The Hub as one user sees it, with patience: see WAITS. say: gets a line for each wait."""

    def __init__(self, token: str | None = None, say: Callable[[str], Any] = print):
        if is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
        token = token or get_token()
        if token is None:
            raise ValueError(
                "no token for the Hub: run 'hf auth login', or set HF_TOKEN; "
                "https://huggingface.co/settings/tokens makes one (with the right to write)"
            )
        self.token, self.say = token, say
        self.api = HfApi(token=token, library_name="clip-phi")

    def retry(self, what: str, action: Callable[[], Result]) -> Result:
        return with_retries(what, action, self.say)

    def check_access(self, repo_id: str, create_pr: bool = False) -> tuple[str, str]:
        """(user, full repo id). Raises ValueError or OSError in one line if the token may not write there."""
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(
                f"{repo_id!r} is no repository of the Hub: user/name, for example alice/clip-phi"
            ) from error
        me = self.retry("asking who you are", self.api.whoami)
        name = me["name"]
        if "/" not in repo_id:
            repo_id = f"{name}/{repo_id}"
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(
                f"{name}'s token may only read: make one that may write at https://huggingface.co/settings/tokens, "
                "then 'hf auth login'"
            )
        namespace = repo_id.split("/")[0]
        orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
        if create_pr or namespace == name:
            return name, repo_id
        if namespace not in orgs:
            mine = ", ".join([name, *sorted(orgs)])
            raise ValueError(
                f"{namespace} is not a namespace of this token (it has {mine}): push to "
                f"{name}/{repo_id.split('/')[1]}, or offer it with --create_pr"
            )
        if orgs[namespace] == "read":
            raise ValueError(f"{name} may read in {namespace} and not write: ask its owners, or give --create_pr")
        return name, repo_id


def push(
    folder: str | Path,
    target: Target,
    *,
    merged: bool = False,
    message: str | None = None,
    pictures: bool = True,
    token: str | None = None,
    say: Callable[[str], Any] = print,
) -> Pushed:
    """Push the checkpoint in `folder`, with a model card of what the run left there.

    merged: push one whole checkpoint, LoRA folded in, instead of the delta that training saved.
    pictures: show the run's held-out sample pictures in the card.

    All files come in one commit. The card is merged into the one that is there; files that an earlier push left and
    that this checkpoint does not have are deleted; files of others stay. Pushed again unchanged, nothing is committed.
    Raises ValueError or OSError, in one line, if it cannot be pushed; the repository is then as it was."""
    folder = Path(folder)
    if target.tag and target.create_pr:
        raise ValueError("--tag names a commit, and a pull request has none yet: tag it when it is merged")
    run = read_run(folder)
    refuse_local_backbones(folder, run.config, merged)
    is_whole = merged or not run.config["delta"]
    hub = Hub(token, say)
    user, repo_id = hub.check_access(target.repo_id, target.create_pr)
    with tempfile.TemporaryDirectory(prefix="clip-phi-push-") as place:
        stage_files(folder, Path(place), run, merged)
        branch = target.branch or "main"
        if not target.create_pr or repo_id.startswith(f"{user}/"):
            hub.retry(
                f"creating {repo_id}", lambda: hub.api.create_repo(repo_id, private=target.private, exist_ok=True)
            )
        _check_tag(hub, repo_id, branch, target)
        if target.branch is not None and not target.create_pr:
            hub.retry(f"creating branch {branch}", lambda: hub.api.create_branch(repo_id, branch=branch, exist_ok=True))
        shown = make_pictures(run)
        if not pictures:
            shown = {name: data for name, data in shown.items() if not name.startswith("samples/")}
        for name, data in shown.items():
            (Path(place) / name).parent.mkdir(exist_ok=True)
            (Path(place) / name).write_bytes(data)
        additions = {name: CommitOperationAdd(name, str(Path(place) / name)) for name in sorted(_relative(Path(place)))}
        hashes = [each.upload_info.sha256.hex() for name, each in additions.items() if name.endswith(".safetensors")]
        tag = target.tag or weights_name(hashes)
        revision = "main" if target.create_pr else tag
        backbones = [run.config.get(f"{part}_backbone") for part in ("vision", "text")]
        licenses = {name: _license(hub, name) for name in backbones if name and not Path(name).is_absolute()}
        card = make_card(run, repo_id, revision, is_whole, shown, licenses)
        title = message or ("Merged checkpoint" if is_whole else "Delta checkpoint")
        pushed = hub.retry(
            f"the commit to {repo_id}",
            lambda: _commit(hub, repo_id, branch, target.create_pr, user, title, additions, card, revision),
        )
    if not target.create_pr:
        _tag(hub, repo_id, tag, pushed.commit, explicit=target.tag is not None)
    return pushed


def check_push(repo_id: str, config: dict[str, Any], merged: bool, folder: str | Path) -> None:
    """Raises ValueError or OSError now for what would keep a model of this config from being pushed later."""
    refuse_local_backbones(Path(folder), config, merged)
    Hub().check_access(repo_id)


def read_run(folder: Path) -> Run:
    """Raises ValueError if the folder holds no checkpoint of Clip-Phi in safetensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (no config.json): give the --output_dir of a training run")
    run = Run.read(folder)
    if run.config.get("model_type") != "clip_phi":
        raise ValueError(f"{folder} holds a {run.config.get('model_type')!r} model, not a 'clip_phi' one")
    run.config.setdefault("delta", False)
    if not list(folder.glob("model*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, which can run any code when it is opened, and is never pushed: "
                "save the model with save_pretrained, which writes safetensors"
            )
        raise ValueError(f"{folder} holds no weights (no model.safetensors)")
    return run


def refuse_local_backbones(folder: Path, config: dict[str, Any], merged: bool) -> None:
    """Raises ValueError for a delta that nobody else could complete."""
    local = [
        config.get(f"{part}_backbone") for part in ("vision", "text") if not config.get(f"{part}_backbone_revision")
    ]
    if config["delta"] and not merged and local:
        raise ValueError(
            f"{folder} is completed from {local[0]}, a folder of this machine that nobody else has: push it whole with "
            "--merged, or train on backbones of the Hub"
        )


def stage_files(folder: Path, place: Path, run: Run, merged: bool) -> None:
    """Put into `place` what is to be pushed: the checkpoint's files alone, with nothing of this machine in them.

    Raises ValueError if a path of this machine or an access token is left in one of them."""
    merge = merged and run.config["delta"]
    if merge:
        from transformers.utils import logging

        from modeling_clip_phi import ClipPhiForCausalLM

        logging.disable_progress_bar()
        model = ClipPhiForCausalLM.from_pretrained(folder)
        model.save_pretrained(place, merged=True)
    for name in _relative(folder):
        if SHIPPED.fullmatch(name) and not (place / name).exists():
            if merge and name.startswith(("model.", "model-", "adapter/")):  # the delta's
                continue
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                (place / name).symlink_to((folder / name).resolve())
            else:
                shutil.copyfile(folder / name, place / name)
    for path in place.rglob("*.json"):
        if path.name != "tokenizer.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            cleaned = _without_local_names(content)
            if cleaned != content:
                path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    private = {str(path) for path in (Path.home(), Path.cwd(), folder.resolve().parent) if len(path.parts) > 1}
    for path in place.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            if found := [each for each in private if f"{each}/" in text] or SECRET.findall(text):
                what = found[0] if found[0].startswith("/") else "an access token"
                raise ValueError(f"{folder / path.relative_to(place)} holds {what}, which does not belong on the Hub")


def _without_local_names(value: Any, key: str = "") -> Any:
    """The value of a json file without names of folders of this machine; Hub ids stay."""
    if isinstance(value, dict):
        kept = {}
        for name, each in value.items():
            if name in ("is_local", "local_files_only") or (name.endswith("name_or_path") and not _is_hub_id(each)):
                continue
            kept[name] = _without_local_names(each, name)
        return kept
    if isinstance(value, list):
        return [_without_local_names(each) for each in value]
    return None if key.endswith("_backbone") and not _is_hub_id(value) else value


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", value)) and not Path(value).exists()


def _commit(
    hub: Hub,
    repo_id: str,
    branch: str,
    create_pr: bool,
    user: str,
    title: str,
    additions: dict[str, CommitOperationAdd],
    card: str,
    revision: str,
) -> Pushed:
    """One try of the commit: reads what is there, and is refused (412) if that changes before the commit is made."""
    api = hub.api
    opened = _open_pull_request(api, repo_id, user, title) if create_pr else None
    at = f"refs/pr/{opened}" if opened else branch
    info = api.model_info(repo_id, revision=at)
    held = {sibling.rfilename for sibling in info.siblings or []}
    old = None
    if "README.md" in held:
        with tempfile.TemporaryDirectory() as cache:
            path = hf_hub_download(
                repo_id, "README.md", revision=info.sha, cache_dir=cache, token=hub.token, endpoint=api.endpoint
            )
            old = Path(path).read_bytes().decode("utf-8")
    wanted = set(additions) | {"README.md"}
    stale = [name for name in sorted(held - wanted) if SHIPPED.fullmatch(name) or PICTURES.fullmatch(name)]
    operations = [
        CommitOperationAdd("README.md", merge_cards(old, card).encode()),
        *additions.values(),
        *(CommitOperationDelete(name) for name in stale),
    ]
    done = api.create_commit(
        repo_id,
        operations,
        commit_message=title,
        revision=at,
        parent_commit=info.sha,
        create_pr=create_pr and opened is None,
    )
    url = done.pr_url or (f"{api.endpoint}/{repo_id}/discussions/{opened}" if opened else None)
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", done.oid, done.oid != info.sha, revision, url)


def _open_pull_request(api: HfApi, repo_id: str, user: str, title: str) -> int | None:
    """The number of the user's own open one of that title: one whose answer was lost, or that is pushed to again."""
    found = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
    return next((each.num for each in found if each.title == title and each.author == user), None)


def _check_tag(hub: Hub, repo_id: str, branch: str, target: Target) -> None:
    if target.tag is None:
        return
    refs = hub.retry(f"reading the tags of {repo_id}", lambda: hub.api.list_repo_refs(repo_id))
    tags = {each.name: each.target_commit for each in refs.tags}
    heads = {each.name: each.target_commit for each in refs.branches}
    if target.tag in tags and tags[target.tag] != heads.get(branch):
        raise ValueError(
            f"{repo_id} already has a tag {target.tag}, at {tags[target.tag][:12]}: choose another --tag, since people "
            "have pinned that one"
        )


def _tag(hub: Hub, repo_id: str, tag: str, commit: str, explicit: bool) -> None:
    what = f"the tag {tag} of {repo_id}"
    hub.retry(what, lambda: hub.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    if explicit:
        refs = hub.retry(what, lambda: hub.api.list_repo_refs(repo_id))
        if {each.name: each.target_commit for each in refs.tags}[tag] != commit:
            raise ValueError(f"pushed as {commit[:12]}, but {tag} names an earlier commit: push with another --tag")


def _license(hub: Hub, backbone: str) -> str | None:
    """What the backbone's own card states."""
    try:
        info = hub.retry(f"the license of {backbone}", lambda: hub.api.model_info(backbone))
    except (OSError, ValueError):
        return None
    return info.card_data.license if info.card_data else None


def _relative(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
