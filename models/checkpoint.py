"""Every weight file: of our runs, of the reference code, and other people's state_dicts.

A checkpoint of ours is one torch file of plain values, loaded with weights_only: format "lcnn", version 1;
model_arch, lcnn (whether --lcnn made that low-curvature), dataset, num_classes, image_size, class_names, flags; data
(their fingerprint); epoch (the last one done), metrics (a dict for each epoch), remark (on the last, or None), model
(state_dict), loss (state_dict, without the network's), and, until the run is finished, optimizer (state_dict).
"""

import functools
import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path

import torch
from torch import Tensor, nn

from models.model_selector import build_network, model_architecture
from models.outside import explained
from models.reference import convert_reference_checkpoint
from utils.errors import UsageError, UserError
from utils.files import write_atomically

FORMAT = {"format": "lcnn", "version": 1}
REQUIRED = {"model_arch": str, "dataset": str, "num_classes": int, "image_size": int}
REQUIRED |= {"flags": dict, "epoch": int, "metrics": list, "model": dict}
# where training scripts put a state_dict
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema", "ema")
# segments of keys that wrappers of a network add: DataParallel, Lightning, ...; a layer may have these names, too
WRAPPER_SEGMENTS = ("module", "model", "net")
# torch.compile, DeepSpeed, FSDP, activation checkpointing, Opacus
TORCH_SEGMENTS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_module")
# what is given in place of weights -> how its content starts
FOREIGN = {
    "a picture": rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|\s*<(svg|\?xml.*<svg)",
    "a PDF document": rb"%PDF",
    "a file of NumPy arrays": rb"\x93NUMPY|PK\x03\x04.{26}[^\0/]+\.npy",
    "an HDF5 file": rb"\x89HDF",
    "a compressed file": rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd",
    "a web page": rb"(?i)\s*<(!doctype html|html)",
    "a pointer that git lfs pull replaces by the file": rb"version https://git-lfs",
    "a table of results": rb"(?!.*\0)(\s*[{\[]|[^\n]*[,;\t])",  # JSON, or text with a separator in its first line
}
EXTRA_STATE = "_extra_state"  # the end of the key of what a module's get_extra_state returned
FITTING = "give the model, and the data set, that they were trained for"
REMEDY = "use another copy of it, or save it with torch.save(model.state_dict(), file)"


def plain(value):
    """Nested dicts and lists with every tensor detached, on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        expanded = value.nbytes > value.untyped_storage().nbytes()  # such a tensor would not be read back
        return value.contiguous() if expanded else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically; path keeps its old content if that fails."""
    buffer = io.BytesIO()
    torch.save(plain(FORMAT | checkpoint), buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path: str | Path, model_arch: str | None = None) -> dict:
    """Read a weight file as a checkpoint, whoever wrote it.

    Args:
        path: a checkpoint of ours; a state_dict of the reference code; or, with package.module:callable, one of that
            network, see ``find_state_dict``.
        model_arch: the architecture, if known; a checkpoint's own must agree with it.

    Returns:
        A dict with model_arch and model (state_dict); of the reference's also num_classes and image_size, of ours all.

    Raises:
        UserError: if there is no such file, it is damaged, or it holds no weights.
        UsageError: if model_arch is another architecture.
    """
    content = read_file(Path(path))
    if isinstance(content, dict) and content.get("format") == FORMAT["format"]:
        check_own_format(content, path)
        if not is_state_dict(content["model"], object):  # a network's state may hold numbers and text, too
            raise UserError(f"{path}: holds no state_dict of its network; {REMEDY}")
    elif model_arch in (None, *model_architecture):
        content = convert_reference_checkpoint(find_state_dict(content, path), path)
        if model_arch == content["model_arch"] + "lowbeta":  # the reference does not record the activation's sharpness
            content["model_arch"] = model_arch
    else:
        content = {"model_arch": model_arch, "model": find_state_dict(content, path)}
    own = content["model_arch"]
    if model_arch not in (None, own):
        raise UsageError(f"{path} holds a {own}, not a {model_arch}; leave --model-arch out")
    return content


def read_file(path: Path):
    """What torch.save or safetensors wrote at path, on the CPU: tensors and plain values only, or UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the checkpoint in it, a .pt file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint, or a state_dict")
    with path.open("rb") as file:
        start = file.read(1000)
    if kind := next((kind for kind, pattern in FOREIGN.items() if re.match(pattern, start, re.DOTALL)), None):
        results = "; estimate_curvature.py's own go to its --compare" if kind == "a table of results" else ""
        raise UserError(f"{path} is {kind}, not weights; give the checkpoint, a .pt file{results}")
    try:
        if start[4:9] == b"\0\0\0\0{":  # safetensors: the length of the header in 8 bytes, then the header, JSON
            from safetensors import torch as safetensors

            return safetensors.load_file(path)
        if zipfile.is_zipfile(path):  # torch itself lets flipped bits in tensors pass
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} has another checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript and sparse tensors, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path}: pip install safetensors, or give a file that torch.save wrote") from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        problem = f": not readable weights ({type(error).__name__}): truncated, damaged, or not plain tensors"
        remedy = REMEDY
        if found := re.search(r"(?:GLOBAL|class|function) ([\w.]+) (?:was not an allowed|whose module)", str(error)):
            problem = f" holds the Python class or function {found[1]}, which is not loaded"
            remedy = "if you trust the file, read it with weights_only=False and torch.save its weights alone"
        elif "TorchScript" in str(error):
            problem = " is a TorchScript archive, whose code is not run"
            remedy = "save its weights alone, by torch.save(torch.jit.load(file).state_dict(), another)"
        raise UserError(f"{path}{problem}; {remedy}") from error


def check_own_format(checkpoint: dict, path: str | Path) -> None:
    """Raise UserError unless a checkpoint of ours has all that it needs, and is of version 1."""
    if checkpoint.get("version") != FORMAT["version"]:
        raise UserError(f"{path}: checkpoint version {checkpoint.get('version')}; this program reads version 1")
    foreign = f"{path}: an incomplete checkpoint, or none of this program"
    for name, kind in REQUIRED.items():
        if type(checkpoint.get(name)) is not kind:
            raise UserError(f"{foreign}: {name} is no {kind.__name__}")
    if checkpoint["image_size"] < 1:
        raise UserError(f"{foreign}: its image size is {checkpoint['image_size']}")
    if not isinstance(checkpoint["flags"].get("data_dir", ""), str):
        raise UserError(f"{foreign}: its data_dir is no folder's name")


def find_state_dict(content, path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a file of other people's: bare, under a name, or one level deeper.

    The names in ``WRAPPERS`` come first, in that order. Under another name it must be the only one. A choice is
    printed. Values that are no tensors, such as an epoch, are passed over, and that is printed, too.

    Raises:
        UserError: if there is none, or if there are several, all under other names; it tells them.
    """
    plain_values = (int, float, str, type(None))
    found = dict(state_dicts(content, plain_values)) or dict(state_dicts(content, object))
    if not found:
        raise UserError(f"{path}: holds no state_dict, and is no checkpoint of this program; {REMEDY}")
    usual = [names for names in found if set(names.split(".")) <= set(WRAPPERS)]
    if not usual and len(found) > 1:
        candidates = " and ".join(map(repr, list(found)[:4]))
        remedy = "save the one to load alone, by torch.save(its dict, file)"
        raise UserError(f"{path}: holds weights under {candidates}; {remedy}")
    chosen = min(usual, key=lambda names: list(map(WRAPPERS.index, names.split("."))), default=min(found))
    others = " and ".join(repr(names) for names in found if names != chosen)
    if others or (chosen and not usual):
        print(f"{path}: the weights under {chosen!r} are taken" + (others and f", not those under {others}"))
    state = found[chosen]
    passed = [key for key, value in state.items() if not isinstance(value, Tensor) and not key.endswith(EXTRA_STATE)]
    if passed:
        print(f"{path}: passed over, as no tensor: {', '.join(passed[:4])}{', ...' * (len(passed) > 4)}")
    for key in passed:
        del state[key]
    return state


def state_dicts(content, beside, name: str = "") -> Iterator[tuple[str, dict]]:
    """The state_dicts in a dict, at most two levels down, each with the names that lead to it, joined by a dot."""
    if is_state_dict(content, beside):
        yield name, content
    elif isinstance(content, dict) and "." not in name:
        for key, inner in content.items():
            if isinstance(key, str):
                yield from state_dicts(inner, beside, f"{name}.{key}".lstrip("."))


def is_state_dict(content, beside) -> bool:
    """Whether it maps names to dense tensors with all of their numbers in the file, or to types that may be beside."""

    def is_plain(key: str, value) -> bool:
        if not isinstance(value, Tensor):
            return key.endswith(EXTRA_STATE) or isinstance(value, beside)
        return value.layout == torch.strided and not value.is_meta and value.nbytes <= value.untyped_storage().nbytes()

    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        return False
    return all(isinstance(key, str) and is_plain(key, value) for key, value in content.items())


def build_model(checkpoint: dict, path: str | Path, model_arch=None, num_classes=None, image_size=None) -> nn.Module:
    """The network of a checkpoint, on the CPU, in eval mode, in the dtype of its weights.

    Args:
        checkpoint: from ``read_checkpoint``; without a model, the network is as the callable makes it.
        path: its file, for messages.
        model_arch: what the user named; a package.module:callable must be, as its code runs.
        num_classes, image_size: where the checkpoint does not tell them.

    Raises:
        UsageError: if package.module:callable is to be run that the user did not name.
        UserError: if the weights do not fit the architecture.
    """
    arch, lcnn = checkpoint["model_arch"], checkpoint.get("lcnn", False)
    num_classes = checkpoint.get("num_classes", num_classes)
    image_size = checkpoint.get("image_size", image_size)
    if arch in model_architecture:
        problem = f"{path}: its image size {image_size} and {num_classes} classes do not fit a {arch}"
        # on the meta device, sizes that the weights turn out not to have take no memory
        with explained(problem, "use another copy of it"), torch.device("meta"):
            model = build_network(arch, num_classes, image_size)
    elif ":" not in arch:
        raise UserError(f"{path}: unknown architecture {arch!r}; there are {', '.join(model_architecture)}")
    elif arch != model_arch:
        raise UsageError(f"{path} is of a network that {arch} makes; if you trust that, give --model-arch {arch}")
    else:
        model = build_network(arch, num_classes, image_size, lcnn, quiet="format" in checkpoint)
    if "format" in checkpoint:
        fill_buffers(model, checkpoint["model"])
    if "model" in checkpoint:
        load_weights(model, checkpoint["model"], path, f"{arch} with {num_classes} classes")
    return model.eval()


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path, name: str) -> nn.Module:
    """Copy a state_dict into the model, which keeps its dtypes.

    Only if a parameter in the file is wider than the model's, the whole model takes that dtype. Buffers do not count: a
    network may have one in float64 for reasons of its own. Keys may have wrappers' segments more or less, see
    ``align``. A model on the "meta" device takes over the tensors.

    Raises:
        UserError: if a key is missing, left over, or has another shape or an impossible dtype.
    """
    with explained(f"{path}: the weights do not fit {name}", FITTING):  # another project's code runs here
        own_state = model.state_dict()
        state = align(state, own_state, path, name)
        for key, own in own_state.items():
            found = state.get(key, own)
            if not isinstance(own, Tensor):
                continue  # extra state, of any kind
            if not isinstance(found, Tensor) or own.is_floating_point() != found.is_floating_point():
                raise TypeError(f"{key} is of {getattr(found, 'dtype', type(found).__name__)}")
        weights = [(key, weight) for key, weight in model.named_parameters() if weight.is_floating_point()]
        pairs = {(weight.dtype, state.get(key, weight).dtype) for key, weight in weights}
        dtypes = {torch.promote_types(*pair) for pair in pairs}
        dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None
        for narrow in {theirs for _, theirs in pairs} - dtypes:
            print(f"{path}: weights of {narrow} are measured in {str(dtype).removeprefix('torch.')}")
        on_meta = any(weight.is_meta for weight in model.parameters())
        if not on_meta and dtypes != {own for own, _ in pairs}:
            model.to(dtype)
        model.load_state_dict(state, assign=on_meta)
        if on_meta:
            model.to(dtype=dtype, memory_format=torch.contiguous_format)
    return model


def fill_buffers(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Make the buffers that are None at the start, and that a run has filled, so that its state can be loaded."""
    device = next(module.parameters(), torch.empty(0)).device
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            saved = state.get(f"{prefix}.{name}".lstrip("."))
            if buffer is None and isinstance(saved, Tensor):
                owner._buffers[name] = torch.empty_like(saved, device=device)


def align(state: dict[str, Tensor], own: dict[str, Tensor], path: str | Path, name: str) -> dict[str, Tensor]:
    """The state_dict under the names of the model's own, if only the segments of wrappers tell them apart.

    As a layer of the model may itself be called "net", every choice of segments to do without is tried, also without
    those that all keys of the file, or all of the model, begin with. The first that fits best is taken. AveragedModel's
    n_averaged is passed over.
    BatchNorm's num_batches_tracked may be missing, as in old files.

    Raises:
        UserError: with the counts, and the first missing and the first unexpected key, if keys are left over.
    """
    if state.keys() == own.keys():
        return state
    keys = [key for key in state if key in own or not key.endswith("n_averaged")]

    def pairs(shared: Iterable[str], number: str, choice: Iterable[str]) -> dict[str, str]:  # own key -> the file's
        segments = [*TORCH_SEGMENTS, number, *choice]
        theirs, ours = bare_names(keys, segments, shared is keys), bare_names(own, segments, shared is own)
        return {key: theirs[bare] for bare, key in ours.items() if bare in theirs}

    sizes = range(len(WRAPPER_SEGMENTS) + 1)
    choices = [choice for size in sizes for choice in combinations(WRAPPER_SEGMENTS, size)]
    found = max((pairs(*attempt) for attempt in product(((), keys, own), ("", "0", "1"), choices)), key=len)
    missing, used = [key for key in own if key not in found], set(found.values())
    unexpected = [key for key in keys if key not in used]
    if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
        problem = f"{len(missing)} keys of the model missing, {len(unexpected)} unexpected"
        for what, left_over in (("missing", missing), ("unexpected", unexpected)):
            problem += f"; first {what} {left_over[0]}" if left_over else ""
        deleting = "" if missing else ", or delete from the file what is not of the network"
        raise UserError(f"{path}: the weights do not fit {name} ({problem}); {FITTING}{deleting}")
    if renamed := [key for key in own if found.get(key, key) != key]:
        example = f"{found[renamed[0]]} read as {renamed[0]}"
        print(f"{path}: wrappers' names added or taken away, such as {example}")
    return {key: state[theirs] for key, theirs in found.items()}


def bare_names(keys: Iterable[str], segments: Iterable[str], shared: bool) -> dict[str, str]:
    """Each key without these segments, and if shared without those that all keys begin with -> the key."""
    names = {re.sub(rf"(?<![^.])({'|'.join(segments)})\.", "", key): key for key in keys}
    while shared and len(first := {re.match(r"([^.]+\.)?", name)[0] for name in names}) == 1 and any(first):
        names = {name.removeprefix(*first): key for name, key in names.items()}
    return names


def load_model(path: str | Path, model_arch: str | None = None) -> nn.Module:
    """The network in a weight file, in eval mode, in its own dtype.

    Args:
        path: the checkpoint file.
        model_arch: its architecture, to be checked; needed for a package.module:callable, which runs.

    Returns:
        (N, 3, H, H) pixels in [0, 1] -> (N, classes) logits, H the checkpoint's image size.

    Raises:
        UserError: if the file is missing, damaged or foreign, or disagrees with model_arch.
    """
    return build_model(read_checkpoint(path, model_arch), path, model_arch)
