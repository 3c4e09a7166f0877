"""clip-phi doctor: can this installation and machine train and serve? Each problem comes with its remedy."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from ..environment import GB, Check, check, check_bitsandbytes, check_device, describe_environment, installed_version

SHARED_MEMORY = Path("/dev/shm")
# A container's limit: version 2 of cgroups, and version 1.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def doctor(as_json: bool, debug: bool) -> int:
    """Print every check, a line each as it comes, or one json object. Returns 1 if there is a problem, else 0.

    debug: raise the error of a check that fails, instead of reporting it. Never prints a token or other secret."""
    checks = []
    for each in examine(debug):
        checks.append(each)
        if not as_json:
            arrow = f" -> {each.remedy}" if each.remedy else ""
            print(f"{each.status:<8} {each.name:<16} {each.found}{arrow}", flush=True)
    problems, notes = (sum(each.status == status for each in checks) for status in ("problem", "note"))
    if as_json:
        try:
            environment = describe_environment()
        except Exception as error:  # without torch, or with a broken one
            environment = {"error": _one_line(error)}
        found = {"environment": environment, "checks": [each._asdict() for each in checks], "problems": problems}
    print(json.dumps(found) if as_json else f"{len(checks)} checks: {problems or 'no'} problems, {notes or 'no'} notes")
    return int(problems > 0)


def examine(debug: bool = False) -> Iterator[Check]:
    """Make all checks. A check that raises an error is a problem itself."""
    for make in CHECKS:
        try:
            yield from make()
        except Exception as error:
            if debug:
                raise
            name = make.__name__.removeprefix("check_").replace("_", " ")
            yield Check("problem", name, _one_line(error), "fix the problems above first; --debug shows the traceback")


def check_python() -> Iterator[Check]:
    is_tested = (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) <= (3, 13)  # as the tests
    found = platform.python_version() + ("" if is_tested else ", which is not tested")
    yield check("python", found, is_tested, "make a virtual environment with Python 3.11 to 3.13", "problem")


def check_packages() -> Iterator[Check]:
    """The requirements of the package and of its extras."""
    from packaging.requirements import Requirement  # comes with transformers

    try:
        needed = map(Requirement, requires("clip-phi") or [])
    except PackageNotFoundError:
        yield Check("note", "packages", "clip-phi is not installed: its requirements are unknown", "pip install -e .")
        return
    seen: set[str] = set()
    for name, specifier, marker in ((each.name, each.specifier, each.marker) for each in needed):
        extra = str(marker or "").partition("extra == ")[2].strip('"')
        if name in seen or extra == "dev" or not (marker is None or marker.evaluate({"extra": extra})):
            continue
        seen.add(name)
        version = installed_version(name)
        if version is None and extra:
            yield Check("note", name, "not installed; only some features need it", f"pip install 'clip-phi[{extra}]'")
            continue
        is_ok = version is not None and specifier.contains(version, prereleases=True)
        found = version if version and is_ok else f"{version or 'not installed'}, but {specifier} is needed"
        yield check(name, found, is_ok, f'pip install "{name}{specifier}"', "problem")


def check_torch_companions() -> Iterator[Check]:
    """transformers imports these if they are installed, and fails if they are built for another torch."""
    for name in ("torchvision", "torchaudio"):
        if (version := installed_version(name)) is None:
            continue
        try:
            import_module(name)
        except Exception as error:  # RuntimeError, OSError or ImportError, depending on what differs
            torch = installed_version("torch")
            wanted = next((each for each in requires(name) or [] if each.startswith("torch=")), "another torch")
            found = f"{version} is built for {wanted}, and torch {torch} is installed: {_one_line(error)}"
            remedy = f"pip uninstall {name} (Clip-Phi does not need it), or install the one for torch {torch}"
            yield Check("problem", name, found, remedy)
        else:
            yield Check("ok", name, version)


def check_threads() -> Iterator[Check]:
    import torch

    threads, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    is_ok = wanted is not None or threads not in range(2, 9) or torch.cuda.is_available()
    found = f"{threads} in each process, OMP_NUM_THREADS={wanted or ''}"
    found += "" if is_ok else "; idle threads use the CPU, and slow down the other processes"
    yield check("OpenMP threads", found, is_ok, "export OMP_NUM_THREADS=1")


def check_memory() -> Iterator[Check]:
    amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits = [path.read_text().strip() for path in map(Path, MEMORY_LIMITS) if path.is_file()]
    amounts += [int(text) for text in limits if text != "max"]
    is_enough = min(amounts) >= 8 * GB
    found = f"{min(amounts) / GB:.1f} GB{'' if is_enough else ': not enough to load phi-2'}"
    remedy = "a larger machine, or a higher limit (docker run --memory); the demo needs 2 GB"
    yield check("memory", found, is_enough, remedy)
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        found = f"{size / GB:.2f} GB in {SHARED_MEMORY}{', for the images of the workers' * (size < GB)}"
        yield check("shared memory", found, size >= GB, "docker run --shm-size=8g, or --dataloader_num_workers 0")


def check_disk() -> Iterator[Check]:
    from huggingface_hub import constants

    cannot = {"folder": "change to a folder of your own", "Hub cache": "make it writable, or set HF_HOME"}
    full = {"folder": "give --output_dir on a larger disk", "Hub cache": "set HF_HOME to a folder on a larger disk"}
    for name, wanted, path in (("folder", 1, Path.cwd()), ("Hub cache", 10, Path(constants.HF_HUB_CACHE))):
        existing = next(each for each in (path, *path.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
        except OSError as error:
            status = "problem" if name == "Hub cache" else "note"
            yield Check(status, name, f"{path} cannot be written: {error.strerror}", cannot[name])
        else:
            yield check(name, f"{path}, {free / GB:.1f} GB free", free >= wanted * GB, full[name])


def check_hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    found = "HF_HUB_OFFLINE is set: nothing is downloaded" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    yield check("Hub", found, not constants.HF_HUB_OFFLINE, "unset HF_HUB_OFFLINE to download")
    has_token = bool(get_token())  # never printed
    yield check("Hub token", "found" if has_token else "none", has_token, "hf auth login, to push a model")


def check_accelerate() -> Iterator[Check]:
    """Accelerate's default configuration, used by a launch without --config_file."""
    import yaml
    from accelerate.commands.config import config_args

    path = Path(config_args.default_config_file)
    config = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    kind = config.get("distributed_type", "NO")
    version = (config.get("fsdp_config") or {}).get("fsdp_version", 1)
    is_ok = kind != "DEEPSPEED" and (kind != "FSDP" or version == 2)
    found = f"{path} ({kind})" if path.is_file() else "no default of your own"
    found += "" if is_ok else f": {f'FSDP {version}' if kind == 'FSDP' else kind} cannot train Clip-Phi"
    yield check("accelerate yaml", found, is_ok, "accelerate launch --config_file accelerate_config.yaml")


def check_training_step() -> Iterator[Check]:
    """One step of stage 1 on a tiny random model: the projector must change, and nothing else."""
    import torch

    from ..batching.attention import has_varlen_kernel
    from ..batching.encode import Encoded
    from ..batching.packing import build_shared_prefix, pack_samples
    from ..training.arguments import Stage1Arguments
    from ..training.model import make_trainable
    from ..training.optim import make_optimizer

    arguments, (device, dtype) = Stage1Arguments(stage=1), _device_and_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, pixels = _tiny_model().to(device, dtype).train(), torch.randn(2, 3, 32, 32)
    make_trainable(model, arguments, device, dtype)
    conversations = [Encoded([5, 6, 7, 8], [-100, 6, 7, 8]), Encoded([9, 10], [9, 10])]
    image = [model.config.image_token_id] * 4
    samples = [build_shared_prefix(conversations[:number], image, str(number)) for number in (2, 1)]
    pack = pack_samples(samples, pixels, 0).to(device)
    optimizer = make_optimizer(model, arguments, device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
    loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    wrong = sorted(moved ^ {name for name in before if ".projector." in name})
    found = f"on {device.type} in {str(dtype).removeprefix('torch.')}: loss {loss.item():.3f}"
    found += f"; attention by {'the varlen kernel' if has_varlen_kernel(device, dtype) else 'SDPA'}"
    if wrong:
        found += f"; frozen weights changed, or trained ones did not: {', '.join(wrong[:3])}"
    is_ok = bool(loss.isfinite()) and not wrong
    yield check("training step", found, is_ok, "install the versions of constraints.txt", "problem")


def check_speech() -> Iterator[Check]:
    """Speech recognition and text-to-speech; check_packages reports absent packages."""
    if all(map(installed_version, ("av", "faster-whisper"))):
        import av
        import numpy as np
        from faster_whisper.vad import get_speech_timestamps

        missing = {"mp3", "flac", "aac", "opus", "vorbis", "pcm_s16le"} - av.codecs_available
        assert not get_speech_timestamps(np.zeros(16_000, np.float32)), "speech detected in silence"
        broken = f"PyAV {av.__version__} cannot decode {', '.join(sorted(missing))}"
        found = broken if missing else "decoding of files and detection of speech work"
        yield check("speech in", found, not missing, "pip install --force-reinstall av")
    if installed_version("hibari-tts"):
        from ..speech.tts import make_tts

        yield Check("ok", "speech out", f"{make_tts().synthesize('Hello.').seconds:.1f} s of 'Hello.'")


def check_whisperx() -> Iterator[Check]:
    """The optional Python environment of WhisperX."""
    from ..speech.whisperx import ABOUT, REQUIREMENT, default_folder, find_installation
    from ..speech.whisperx import check as check_version

    folder, again = default_folder(), "clip-phi speech install"
    if not folder.exists():
        yield Check("note", "WhisperX", "not installed; faster-whisper is used", again)
        return
    try:
        found = find_installation()
        version = check_version(found)
    except OSError as error:
        what = _one_line(error) if (folder / ABOUT).exists() else f"{folder} is incomplete"
        yield Check("problem", "WhisperX", what, again)
    else:
        is_tested = f"whisperx=={version}" == REQUIREMENT
        about = f"{version} ({found.form} form) in {folder}{'' if is_tested else f', not the tested {REQUIREMENT}'}"
        yield check("WhisperX", about, is_tested, again)


CHECKS = (
    *(check_python, check_packages, check_torch_companions, check_device, check_bitsandbytes, check_threads),
    *(check_memory, check_disk, check_hub, check_accelerate, check_speech, check_whisperx, check_training_step),
)


def _device_and_dtype() -> tuple[Any, Any]:
    """Where training would run, and the precision of its frozen weights there."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def _tiny_model() -> Any:
    """A CLIP tower and a Phi decoder of random weights; 64 x 64 weights between are what Adam8bit holds in 8 bits."""
    from transformers import CLIPVisionConfig, PhiConfig

    from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = CLIPVisionConfig(**shape, image_size=32, patch_size=16), PhiConfig(**shape, vocab_size=128)
    return ClipPhiForCausalLM(ClipPhiConfig(vision_config=vision, text_config=text, image_token_id=127))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
