"""detectron2's checkpointer: atomic, reading foreign files as data, strict about what it loads."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlparse

from torch import Tensor, nn

from dn_detr.checkpoint.class_rows import count_classes, move_rows, pair_names
from dn_detr.checkpoint.contents import AVERAGED, as_tensors, own_metadata
from dn_detr.checkpoint.formats import FORMATS, detect_format, sample
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint
from dn_detr.checkpoint.writing import (
    build_metadata,
    remove_leftovers,
    save_atomically,
    write_text_atomically,
)
from dn_detr.data.categories import DatasetError, class_mapping
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts  # noqa: E402

__all__ = ["CheckpointError", "DNCheckpointer", "build_metadata"]

_GAP = "N/A"  # `class_mapping`'s name for a class without objects
_BACKBONE = "backbone."

Categories = Sequence[Mapping[str, Any]]


class DNCheckpointer(DetectionCheckpointer):
    """What differs from detectron2's own checkpointer, and why:

    1. Nothing in a file is run (`reading`). Stock: `.pkl` is unpickled freely.
    2. A save is whole or absent, and holds plain data and "metadata" (`writing`). Stock: a full
       disk or a kill leaves a cut file under its final name.
    3. `load_weights` refuses what does not fit, and carries class rows over by name. Stock: warns,
       and goes on with random weights.

    `load`, `resume_or_load`, `has_checkpoint` and the file `last_checkpoint` are as in detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        metadata: dict[str, Any] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model: the model; DistributedDataParallel is looked through.
            save_dir: folder of the checkpoints, on this machine.
            metadata: of `build_metadata`, saved in every checkpoint.
            save_to_disk: None: in the main process only.
            checkpointables: objects with state_dict() and load_state_dict(), saved by these names.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logging.getLogger(__name__)
        self.metadata = metadata if metadata is not None else build_metadata("", [])

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Writes `save_dir/name.pth`, then names it in `last_checkpoint`.

        Args:
            name: file name without ".pth".
            tag: False leaves `last_checkpoint`, from which training resumes, as it is.
            kwargs: more plain data to save, such as `iteration`.

        Raises:
            TypeError: a state_dict holds more than tensors and plain Python values.
            OSError: the file cannot be written; the former one, and `last_checkpoint`, are intact.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "metadata": self.metadata}
        data.update((key, item.state_dict()) for key, item in self.checkpointables.items())
        data.update(kwargs)
        file_name = f"{name}.pth"
        assert os.path.basename(file_name) == file_name, file_name
        path = os.path.join(self.save_dir, file_name)
        self.logger.info("Saving checkpoint to %s", path)
        os.makedirs(self.save_dir, exist_ok=True)
        save_atomically(data, path)
        remove_leftovers(self.save_dir)
        if tag:
            self.tag_last_checkpoint(file_name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint to resume from."""
        write_text_atomically(
            last_filename_basename, os.path.join(self.save_dir, "last_checkpoint")
        )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in detectron2, usable again after a failure."""
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None

    def load_weights(
        self, path: str, *, categories: Categories | None = None, strict: bool
    ) -> dict[str, Any]:
        """Loads the model, to train from (not strict) or to evaluate (strict).

        Not strict: class rows whose class is named in both are kept, the others, and parameters of
        another shape, stay as initialised. An ImageNet backbone of detectron2's zoo goes into the
        backbone, whole. All that is said in the log.
        Strict: every key and shape fits, and the classes are those of the data.

        Args:
            path: a file, or an address that detectron2 can fetch ("detectron2://...").
            categories: the data's, each with "id" and "name", ordered by id; None: do not compare.
            strict: see above.

        Returns:
            what the file holds beside the model.

        Raises:
            CheckpointError: the file cannot be read, has nothing for this model, holds numbers that
                are not finite, is to be converted first, or (strict) does not fit.
        """
        checkpoint = self._read(path)
        metadata = own_metadata(checkpoint, path)
        state = as_tensors(checkpoint.pop("model"), path)
        if checkpoint.pop("matching_heuristics", False):
            c2_names = checkpoint.get("__author__") == "Caffe2"
            state = self._match_backbone(state, path, c2_names, strict)
        else:
            _check_converted(state, path)
            theirs = metadata.get("categories", [])
            state = self._fit_classes(state, theirs, categories, path, strict)
        if strict and isinstance(checkpoint.get(AVERAGED), Mapping):
            as_tensors(checkpoint[AVERAGED].get("model"), f"{path} (averaged weights)")
        self._load_state(state, path, strict)
        return checkpoint

    def resume(self, path: str, *, categories: Categories) -> dict[str, Any]:
        """Loads the model, strictly, and all that was saved beside it, to go on with a training.

        Returns:
            what the file holds beside the model.

        Raises:
            CheckpointError: see `load_weights`. Stock: a model of other shapes or classes is loaded
                in part, and goes on.
        """
        rest = self.load_weights(path, categories=categories, strict=True)
        for name, item in self.checkpointables.items():
            if name in rest:
                item.load_state_dict(rest[name])
        return rest

    def _read(self, path: str) -> dict[str, Any]:
        self._parsed_url_during_load = urlparse(path)
        try:
            return self._load_file(
                self.path_manager.get_local_path(
                    self._parsed_url_during_load._replace(query="").geturl()
                )
            )
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Reads a local file into {"model": ..., ...}; called by `load`, too."""
        data = read_checkpoint(filename)
        if not isinstance(data, Mapping):
            raise CheckpointError(
                f"Checkpoint {filename} holds a {type(data).__name__}, not a dict of weights."
            )
        if filename.endswith(".pyth"):  # pycls
            model = data.get("model_state", {})
            return {"model": model, "__author__": "pycls", "matching_heuristics": True}
        if filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            data = data.get("blobs", data)  # Caffe2, of Detectron's time
            model = {k: v for k, v in data.items() if not k.endswith("_momentum")}
            return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
        loaded = dict(data) if "model" in data else {"model": data}
        query = parse_qs(self._parsed_url_during_load.query if self._parsed_url_during_load else "")
        if query.pop("matching_heuristics", None) == ["True"]:
            loaded["matching_heuristics"] = True
        if query:
            raise CheckpointError(f"{filename}: unknown in its address: {', '.join(query)}")
        return loaded

    def _match_backbone(
        self, state: dict[str, Tensor], path: str, c2_names: bool, strict: bool
    ) -> dict[str, Tensor]:
        """The backbone's entries among weights that are named as a backbone of its own."""
        wanted = {k: v for k, v in self.model.state_dict().items() if k.startswith(_BACKBONE)}
        # Only what the heuristics renamed is meant for the backbone; the rest, such as ImageNet's
        # classifier, they hand through as it is.
        matched = align_and_update_state_dicts(wanted, dict(state), c2_conversion=c2_names)
        matched = {name: value for name, value in matched.items() if name in wanted}
        missing = [k for k in wanted if k not in matched and not k.endswith("num_batches_tracked")]
        stages = {name.split(".")[0] for name in matched}
        left = [k for k in state if k.startswith("res") and f"{_BACKBONE}{k}" not in matched]
        if stages and (missing or left):
            raise CheckpointError(
                f"{path} does not fit this backbone: {len(missing)} of its {len(wanted)} entries "
                f"are missing ({sample(missing)}) and {len(left)} of the file are left over "
                f"({sample(left)}). Is one a ResNet-50 and the other a ResNet-101? Set "
                f'train.init_checkpoint to the matching file, or to "" to train from scratch.'
            )
        if not strict:
            self.logger.info(
                "%s: %d entries loaded into the backbone, the rest of the model starts fresh.",
                path,
                len(matched),
            )
        return matched

    def _fit_classes(
        self,
        state: dict[str, Tensor],
        theirs: Categories,
        ours: Categories | None,
        path: str,
        strict: bool,
    ) -> dict[str, Tensor]:
        """The weights with their class rows where the model has those classes."""
        fresh = self.model.state_dict()
        old_count, new_count = count_classes(state), count_classes(fresh)
        if old_count is None or new_count is None or (ours is None and old_count == new_count):
            return state
        new = _row_names(ours, new_count) if ours else [None] * new_count
        try:
            old = _row_names(theirs, old_count)
        except DatasetError:  # its own categories do not fit its rows
            old = []
        if not old and old_count == new_count:
            self.logger.info(
                "%s does not name its %d classes; they are taken to be the data's.", path, old_count
            )
            return state
        if old_count == new_count and all(map(_same_name, old, new)):
            return state
        if strict:
            raise CheckpointError(_class_message(path, old, new, old_count))
        pairs = pair_names(old, new)
        self._log_classes(path, pairs, new)
        return move_rows(state, fresh, pairs)

    def _log_classes(
        self, path: str, pairs: Sequence[tuple[int, int]], new: Sequence[str | None]
    ) -> None:
        kept = {row for _, row in pairs}
        names = [name for row, name in enumerate(new) if row in kept and name]
        fresh = [name for row, name in enumerate(new) if row not in kept and name]
        self.logger.info(
            "%s has other classes than the data. Class rows kept by name: %d%s; new ones: %d%s.",
            path,
            len(names),
            f" ({sample(names)})" if names else "",
            len(fresh),
            f" ({sample(fresh)})" if fresh else "",
        )

    def _load_state(self, state: dict[str, Tensor], path: str, strict: bool) -> None:
        own = self.model.state_dict()
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        shared = [name for name in own if name in state]
        reshaped = [
            f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in shared
            if state[name].shape != own[name].shape
        ]
        fitting = len(shared) - len(reshaped)
        if fitting == 0 or (strict and (missing or unexpected or reshaped)):
            problems = {
                "missing in the file": missing,
                "unknown to the model": unexpected,
                "of another shape": reshaped,
            }
            lines = [
                f"  {key}: {len(names)} ({sample(names)})"
                for key, names in problems.items()
                if names
            ]
            raise CheckpointError(
                f"Checkpoint {path} does not fit the model: {fitting} of {len(own)} entries fit.\n"
                + "\n".join(lines)
                + "\nWas it saved with another config? A checkpoint names its own under "
                '["metadata"]["config"].'
            )
        incompatible = self._load_model({"model": state})
        if not all(name.startswith(_BACKBONE) for name in state):
            self._log_incompatible_keys(incompatible)


def _check_converted(state: Mapping[str, Tensor], path: str) -> None:
    kind = detect_format(state)
    if kind is not None:
        raise CheckpointError(
            f"{path} holds {FORMATS[kind].title} weights. Convert it first: python "
            f"tools/convert_checkpoint.py {path} OUTPUT.pth --config-file "
            f"projects/*/configs/{FORMATS[kind].model}_....py"
        )


def _row_names(categories: Categories, num_classes: int) -> list[str | None]:
    """The class of every row; None for a row without one. Empty where there are no categories."""
    if not categories:
        return []
    names, _ = class_mapping([dict(c) for c in categories], num_classes)
    return [None if name == _GAP else name for name in names]


def _same_name(a: str | None, b: str | None) -> bool:
    return bool(pair_names([a], [b])) or a is b is None


def _class_message(
    path: str, old: Sequence[str | None], new: Sequence[str | None], old_count: int
) -> str:
    theirs, ours = {name for name in old if name}, {name for name in new if name}
    message = f"Checkpoint {path} has other classes than the data: "
    if theirs == ours:
        return message + (
            f"the same names, but {old_count} class rows where the model has {len(new)}; set "
            f"model.num_classes={old_count}."
            if old_count != len(new)
            else "the same names in another order. Order the categories of the data as "
            "the checkpoint does, by their ids."
        )
    return message + (
        f"{len(theirs) or old_count} and {len(ours)}. Only in the checkpoint: "
        f"{sample(theirs - ours) or '-'}; only in the data: {sample(ours - theirs) or '-'}. "
        f"Use the data it was trained for, or fine-tune it: train.init_checkpoint={path}"
    )
