"""Load, save and convert checkpoints."""

from __future__ import annotations

import importlib.resources
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

from . import native, public
from .folder import check_destination, replace_folder
from .problems import about, listed
from .public import Weights
from .tensors import check_finite, check_layout, plain_layout

Form = Literal["safetensors", "public"]

FORMS = {"safetensors": native, "public": public}
REPLACEABLE = [name for form in FORMS.values() for name in (form.CONFIG_FILE, form.WEIGHTS_FILE)]

RUN_FILE, RUN_MODEL = "recipe.yaml", "model"
"""The file that identifies a run directory, and the folder in it that holds its model."""
PICKLED_FILE = ".metadata"
"""Metadata file of torch.distributed.checkpoint."""
RECOGNIZED = ("*.pt", "*.safetensors", "config.*", RUN_FILE, "checkpoints", PICKLED_FILE)
"""A folder with an entry of such a name is meant to be a checkpoint, if a damaged one."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's configuration and weights.

    Attributes:
        config: everything except the weights.
        state_dict: the weights in the published order: contiguous CPU tensors that own their memory, with exactly the
            names and shapes of ``parameter_shapes(config.model)``, of a floating-point dtype, finite.
        source: the folder or ``.pt`` file from which it was read.
    """

    config: PixelFlowConfig
    state_dict: dict[str, Tensor]
    source: str


def load_checkpoint(path_or_name: str | os.PathLike[str], weights: Weights = "auto") -> Checkpoint:
    """Read a checkpoint of any form and validate all of it.

    Args:
        path_or_name: one of

            - a folder with ``config.json`` and ``model.safetensors``, which take precedence over the next two;
            - a folder with ``config.yaml`` and ``model.pt``, or with one ``model_STEP.pt`` of a training run;
            - a ``.pt`` file with a ``config.yaml`` beside it;
            - a run directory of ``pixelflow train``: the averaged model as of its last evaluation. Its ``checkpoints``,
              whose metadata is a pickle, are never read here;
            - the name of a bundled model. An existing path takes precedence over a name, but for a folder without any
              file of a checkpoint.
        weights: which weights of a training checkpoint (a ``.pt`` file with the key ``model`` or ``ema``) to read:
            "ema", "model", or "auto", which takes the moving average if there is one. Any other checkpoint has one set
            of weights and accepts only "auto".

    Returns:
        The checkpoint, on the CPU, in the stored dtypes.

    Raises:
        CheckpointError: the checkpoint is missing or invalid; the message names the file, what was found and what was
            expected.
    """
    _check_option("weights", weights, Weights)
    path = _located(path_or_name)
    with about(path, OSError), torch.inference_mode(False), torch.device("cpu"):
        if path.is_dir():
            config, state_dict = _read_folder(path, weights)
        elif path.suffix == ".pt":
            config, state_dict = public.read_public(path, weights)
        else:
            raise CheckpointError(f"{path}: expected a folder or a .pt file")
    return Checkpoint(config, state_dict, str(path))


def save_checkpoint(
    path: str | os.PathLike[str],
    config: PixelFlowConfig,
    state_dict: Mapping[str, Tensor],
    overwrite: bool = False,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a new folder, atomically.

    When this returns, the checkpoint is on the disk. When it raises, nothing has changed: there is no partial folder,
    and an existing checkpoint is still there.

    Args:
        path: the folder to create; its missing parents are made.
        config: the model's configuration.
        state_dict: its weights: contiguous, finite CPU tensors of a floating-point dtype, with exactly the names and
            shapes of ``parameter_shapes(config.model)``.
        overwrite: replace an existing checkpoint. A folder that holds anything else is never replaced.

    Raises:
        CheckpointError: the destination exists or cannot be written, or the weights do not match the model.
    """
    _save(path, config, state_dict, "safetensors", overwrite)


def save_training_checkpoint(
    path: str | os.PathLike[str],
    config: PixelFlowConfig,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    step: int,
    overwrite: bool = False,
) -> Path:
    """Write trained and averaged weights in the published training form, atomically.

    The files are ``config.yaml`` and ``model_STEP.pt``, a dict with the keys ``model`` and ``ema``. The published keys
    ``opt`` and ``args``, for the optimizer's state and the command line, are omitted.

    Args:
        path: the folder to create; its missing parents are made.
        config: the model's configuration.
        model, ema: trained and averaged weights, as in :func:`save_checkpoint`.
        step: training step of the weights.
        overwrite: replace an existing folder that holds only such files.

    Returns:
        The path of the ``.pt`` file, which :func:`load_checkpoint` accepts.

    Raises:
        CheckpointError: as in :func:`save_checkpoint`.
    """
    _check_path(path)
    with about(Path(path), OSError, RuntimeError, ValueError):
        destination = Path(path).resolve()
        sets = {key: _checked(config, weights, destination) for key, weights in (("model", model), ("ema", ema))}
        older = [file.name for file in destination.glob("model_*.pt")]
        replace_folder(
            destination,
            lambda folder: public.write_public_training(folder, config, sets, step),
            overwrite=overwrite,
            replaceable=[public.CONFIG_FILE, *older],
        )
        return Path(path) / public.training_file(step)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Form = "safetensors",
    weights: Weights = "auto",
    overwrite: bool = False,
) -> Checkpoint:
    """Read a checkpoint of any form and write it in our form or the public one, without changing a bit of a weight.

    Args:
        source, weights: as in :func:`load_checkpoint`.
        destination, overwrite: as in :func:`save_checkpoint`; never the folder that is read, nor one that holds it.
        to: "safetensors" for ``config.json`` and ``model.safetensors``, "public" for ``config.yaml`` and ``model.pt``.

    Returns:
        The checkpoint as read back from the destination.

    Raises:
        CheckpointError: as in those two functions.
    """
    _check_option("to", to, Form)
    _check_path(destination)
    _check_apart(_located(source), Path(destination))
    with about(Path(destination), OSError, RuntimeError, ValueError):  # fail before a large file is read
        check_destination(Path(destination).resolve(), overwrite=overwrite, replaceable=REPLACEABLE)
    checkpoint = load_checkpoint(source, weights)
    _save(destination, checkpoint.config, checkpoint.state_dict, to, overwrite)
    del checkpoint  # one copy of the weights at a time
    return load_checkpoint(destination)


def _check_apart(source: Path, destination: Path) -> None:
    """Refuse to replace what is converted: a training checkpoint would lose all weights but those that are chosen."""
    with about(destination, OSError, RuntimeError, ValueError):
        read = source / RUN_MODEL if (source / RUN_FILE).is_file() and (source / RUN_MODEL).is_dir() else source
        if read.resolve().is_relative_to(destination.resolve()):
            raise CheckpointError(f"{destination}: would replace {source}, which is converted; expected another folder")


def _save(
    path: str | os.PathLike[str],
    config: PixelFlowConfig,
    state_dict: Mapping[str, Tensor],
    to: Form,
    overwrite: bool,
) -> None:
    _check_path(path)
    # RuntimeError: a loop of symbolic links, or a full disk in torch.save.
    with about(Path(path), OSError, RuntimeError, ValueError):
        destination = Path(path).resolve()
        ordered = _checked(config, state_dict, destination)
        write = native.write_native if to == "safetensors" else public.write_public
        replace_folder(
            destination, lambda folder: write(folder, config, ordered), overwrite=overwrite, replaceable=REPLACEABLE
        )


def _checked(config: PixelFlowConfig, state_dict: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict in the published order, after checking that it can be loaded again."""
    if not isinstance(config, PixelFlowConfig):
        raise CheckpointError(f"{path}: the configuration is a {type(config).__name__}, expected a PixelFlowConfig")
    check_layout(plain_layout(state_dict, path), config.model, path)
    for name, tensor in state_dict.items():
        if not tensor.is_contiguous():
            raise CheckpointError(f"{path}: {name}: got strides {tensor.stride()}, expected a contiguous tensor")
        check_finite(name, tensor, path)
    return {name: state_dict[name].detach() for name in parameter_shapes(config.model)}


def _read_folder(folder: Path, weights: Weights) -> tuple[PixelFlowConfig, dict[str, Tensor]]:
    has_native = (folder / native.WEIGHTS_FILE).exists()
    # An unrelated config.json may be beside the public files, so config.json alone does not decide.
    if (folder / public.CONFIG_FILE).exists() and not has_native:
        return public.read_public(_published_file(folder), weights)
    if has_native or (folder / native.CONFIG_FILE).exists():
        public.refuse_choice(weights, folder)
        return native.read_native(folder)
    if (folder / RUN_FILE).is_file():
        if not (folder / RUN_MODEL).is_dir():
            raise CheckpointError(f"{folder}: a run without a model yet: its first evaluation writes one")
        return _read_folder(folder / RUN_MODEL, weights)
    if (folder / PICKLED_FILE).exists():
        raise CheckpointError(
            f"{folder}: a checkpoint of torch.distributed.checkpoint, which is never read as a model: its metadata is "
            "a pickle, and loading one runs whatever code its author put there (pixelflow train publish takes runs "
            "of your own)"
        )
    pairs = " nor ".join(f"{form.CONFIG_FILE} with {form.WEIGHTS_FILE}" for form in FORMS.values())
    raise CheckpointError(f"{folder}: holds neither {pairs}")


def _published_file(folder: Path) -> Path:
    """``model.pt``, or the only checkpoint of a training."""
    trained = sorted(folder.glob("model_*.pt"))
    if (folder / public.WEIGHTS_FILE).exists() or not trained:
        return folder / public.WEIGHTS_FILE
    if len(trained) > 1:
        names = listed([file.name for file in trained])
        raise CheckpointError(f"{folder}: holds {names}, expected the path of one of them")
    return trained[0]


def _located(path_or_name: str | os.PathLike[str]) -> Path:
    if not isinstance(path_or_name, (str, os.PathLike)) or path_or_name == "":
        raise CheckpointError(f"checkpoint: got {path_or_name!r}, expected a path or the name of a bundled model")
    path = Path(path_or_name)
    with about(path, OSError, ValueError):
        bundled = bundled_models()
        named = bundled.get(str(path_or_name))
        # A folder that only happens to have a bundled model's name does not hide it.
        if named is not None and path.is_dir() and not any(any(path.glob(entry)) for entry in RECOGNIZED):
            return named
        if path.exists():
            return path
        if named is not None:
            return named
    names = listed(sorted(bundled)) or "none"
    raise CheckpointError(f"{path}: no such file or folder, and no bundled model of this name; bundled are: {names}")


def bundled_models() -> dict[str, Path]:
    """Folders of the models that are shipped with the package, by name."""
    assets = importlib.resources.files("pixelflow_engine").joinpath("assets")
    if not isinstance(assets, Path) or not assets.is_dir():  # a package inside a zip file has no folders
        return {}
    return {folder.name: folder for folder in assets.iterdir() if (folder / native.CONFIG_FILE).is_file()}


def _check_path(path: object) -> None:
    # An empty text, such as that of an unset variable, would be the working directory, which overwrite would replace.
    if not isinstance(path, (str, os.PathLike)) or path == "":
        raise CheckpointError(f"destination: got {path!r}, expected the path of a folder to write")


def _check_option(name: str, value: object, choices: object) -> None:
    known = typing.get_args(choices)
    if value not in known:
        raise CheckpointError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
