"""Read rows of text, conversations or instructions from files, directories and the hub.

The road from data to batches, each part usable alone::

    rows = load_rows("train.jsonl.gz")                        # datasets.Dataset
    examples = encode_rows(rows, tokenizer, loss_on="all")    # tokens and which are targets
    packed = pack(examples, seq_len=1024)                     # arrays [N, T]
    ds = batches(packed, batch_size=8, seed=0)                # ds[i] is the batch of step i
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import datasets.table
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill._memory import available_memory
from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json
from jaxdistill.train.chat_rows import FIELDS, FORMS, NESTED, row_form, travelling
from jaxdistill.train.encode import Example, encode_rows
from jaxdistill.train.packing import Packed, batches, eval_batches, fingerprint, pack
from jaxdistill.train.text_file import DOCUMENT, read_lines, read_text

__all__ = [
    "Example",
    "Packed",
    "batches",
    "encode_rows",
    "eval_batches",
    "fingerprint",
    "load_rows",
    "pack",
]

_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_TEXT = (".txt", ".txt.gz")
_ENDINGS = (*_JSON, *_TEXT, ".parquet")
_ACCEPTED = (
    f"a file ending in {', '.join(_ENDINGS)}, a directory of such files, or the name of a hub data "
    "set such as 'owner/name' or 'owner/name:config'"
)
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")
_COLUMNS = (*FIELDS, "weight")
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}
_MAX_COLUMNS, _MAX_DEPTH = 256, 8
_SPLITS |= {split: split for split in ("train", "test", "validation")}


def load_rows(source: str, *, split: str = "train") -> datasets.Dataset:
    """Load the rows of one split, as they are, in the order of the files.

    Args:
        source: what exists on disk comes first, then the hub.

            - A file: ``.jsonl`` (one object a line), ``.json`` (a list of objects, or one object a
              line), ``.txt`` (the whole file is one document), each also with ``.gz``, or
              ``.parquet``. One file is one split, whatever ``split`` says.
            - A directory, searched with its subdirectories, in the order of the sorted paths. A
              file belongs to the split that a folder, or the first or last word of its name, names
              (``gsm8k_train.jsonl``, ``valid-00000-of-00001.parquet``), else to ``train``. Hidden
              files and files with other endings are left out.
            - A hub data set ``owner/name``, with ``:config`` where it has several.
        split: ``train``, ``validation`` or ``test``; on the hub anything that
            ``datasets.load_dataset`` takes (``train[:1%]``).

    Returns:
        At least one row. Every row of a JSON file was checked to have one of the accepted forms;
        columns beyond those are kept where Arrow can hold them. Lists of messages and tools are
        JSON text, as ``encode_rows`` reads it, so that each row keeps its own keys. Data from files
        is held in memory: nothing is written next to the files, and no home directory is needed.

    Raises:
        UserError: if nothing is found, a line cannot be read, no row is there, or the columns are
            none that ``encode_rows`` accepts.
    """
    if not source.strip():
        raise UserError(f"--data must name a source, got {source!r}; accepted: {_ACCEPTED}")
    path = Path(source)
    if path.is_dir():
        files = _files_of_split(path, split)
        rows = _join(source, [_load_file(file) for file in files])
    elif path.exists():
        rows = _load_file(path)
    else:
        rows = _load_hub(source, split)
    if not len(rows):
        raise UserError(f"data {source!r} holds no rows; accepted: at least one row; add some")
    names = rows.column_names
    forms = ({"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"})
    if not any(form <= set(names) for form in (*forms, {"instruction", "output"})):
        raise UserError(
            f"data {source!r} has the columns {', '.join(names)}; accepted: {FORMS}; rename them"
        )
    return rows


def _files_of_split(directory: Path, split: str) -> list[Path]:
    """List the data files of a directory that belong to the split, sorted by path."""
    found: dict[str, list[Path]] = {}
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        if file.is_file() and file.name.lower().endswith(_ENDINGS) and not hidden:
            found.setdefault(_split_of(inside), []).append(file)
    wanted = _SPLITS.get(split, split)
    if not found:
        raise UserError(
            f"directory {str(directory)!r} holds no data files; accepted: files ending in "
            f"{', '.join(_ENDINGS)}; put one there or give another directory"
        )
    if wanted not in found:
        raise UserError(
            f"directory {str(directory)!r} has no files of the split {split!r}; "
            f"accepted: {', '.join(sorted(found))}; choose one of these or give a single file"
        )
    return found[wanted]


def _split_of(inside: Path) -> str:
    """Tell the split a file belongs to from its folders and the first or last word of its name."""
    name = re.sub(r"-\d+-of-\d+", "", inside.name.split(".")[0]).lower()
    words = re.split(r"[-_ ]", name)
    for word in (*(part.lower() for part in inside.parts[:-1]), words[0], words[-1]):
        if word in _SPLITS:
            return _SPLITS[word]
    return "train"


def _load_file(path: Path) -> datasets.Dataset:
    """Read one file into memory."""
    name = path.name.lower()
    if not name.endswith(_ENDINGS):
        raise UserError(
            f"data file {str(path)!r} has the ending {path.suffix!r}; "
            f"accepted: {', '.join(_ENDINGS)}; convert it"
        )
    if name.endswith(".parquet"):
        return _load_parquet(path)
    try:
        return _dataset(path, list(_text_rows(path) if name.endswith(_TEXT) else _json_rows(path)))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"data file {str(path)!r} cannot be read ({_line(error)}); accepted: UTF-8 text, "
            "gzip-compressed where the name ends in .gz; write it again"
        ) from error


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole file as one document, or nothing if it is blank."""
    text = read_text(path, DOCUMENT)
    if text.strip():
        yield {"text": text}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the checked rows of a JSON lines file, or of a file that is one JSON list.

    Parsed here and not by ``datasets``: a bad line is named by its number, rows of several forms
    may share a file, and no string is taken for a date.
    """
    if ".jsonl" in path.name.lower():
        numbered = _json_lines(path, read_lines(path))
    else:
        numbered = _json_document(path, read_text(path))
    for where, row in numbered:
        row_form(row, where)
        yield row


def _json_document(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    """Give the values of a JSON list, or of JSON lines if the text is no list."""
    if not text.lstrip().startswith("["):
        return _json_lines(path, text.split("\n"))
    try:
        return [(f"{path} row {number}", row) for number, row in enumerate(_parsed(text), 1)]
    except ValueError as error:
        raise UserError(
            f"data file {str(path)!r} is not JSON ({_line(error)}); "
            "accepted: a list of objects, or one object a line; correct it"
        ) from error


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield where each line stands and its value; blank lines are skipped."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number} is not JSON ({_line(error)}); "
                "accepted: one object a line; correct or remove the line"
            ) from error
        yield f"{path}:{number}", row


def _parsed(text: str) -> Any:
    return parse_json(text, constants=True)  # Python writes NaN into columns that are not used here


def _dataset(path: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Turn rows into columns; beside the known ones, only those that Arrow can hold."""
    rows = [travelling(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    if len(names) > _MAX_COLUMNS:
        names = {name: None for name in _COLUMNS if name in names}
    columns = {}
    for name in names:
        column = [row.get(name) for row in rows]
        try:
            if name in _COLUMNS or not _is_wild(column):
                columns[name] = datasets.Dataset.from_dict({name: column}).data.column(0)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            if name in _COLUMNS:
                raise UserError(
                    f"data file {str(path)!r} has values of several types in {name!r} "
                    f"({_line(error)}); accepted: one type; make it equal in all rows"
                ) from error
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


def _is_wild(column: list[Any]) -> bool:
    """Tell whether the objects in a column have too many keys, or are nested too deeply.

    Each key is a column to Arrow, of a place in every row; and ``datasets`` looks at every level
    twice, at 90 levels for ever.
    """
    paths: dict[tuple[int, str], int] = {}
    level, depth = [(0, value) for value in column if isinstance(value, dict | list)], 0
    while level and len(paths) <= _MAX_COLUMNS and depth <= _MAX_DEPTH:
        depth += 1
        children = []
        for at, node in level:
            inside = node.items() if isinstance(node, dict) else (("", child) for child in node)
            for key, child in inside:
                if isinstance(node, dict) or isinstance(child, dict | list):
                    path = paths.setdefault((at, key), len(paths) + 1)
                    if isinstance(child, dict | list):
                        children.append((path, child))
        level = children
    return len(paths) > _MAX_COLUMNS or depth > _MAX_DEPTH


def _load_parquet(path: Path) -> datasets.Dataset:
    """Read a Parquet file into memory, as plain values.

    What the file says of itself to ``datasets`` is left out: it can make strings be taken for
    paths of images to open. Read in pieces, because a page of a few bytes can stand for any number
    of rows: what they take is counted against the memory that there is.
    """
    try:
        with pq.ParquetFile(path) as file:
            given = file.schema_arrow
            if len(given) > _MAX_COLUMNS:
                raise ValueError(f"it has {len(given)} columns")
            schema = pa.schema([pa.field(f.name, _travelling_type(f)) for f in given])
            most = available_memory() or 2**40
            if file.metadata.num_rows * len(given) * 8 > most:
                count = file.metadata.num_rows
                raise UserError(f"{str(path)!r} has {count} rows: more than memory holds")
            read, rows, taken = [], 0, 0
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                batch.validate(full=True)  # UTF-8, and every offset and index inside
                read.append(_travelling_batch(batch).cast(schema))  # no dictionary any more
                rows, taken = rows + batch.num_rows, taken + read[-1].nbytes
                # A quarter, because the rows are copied and tokenized; four times, because the
                # first rows may be the longest.
                if taken > most / 4 or taken / max(1, rows) * file.metadata.num_rows > 4 * most:
                    raise UserError(
                        f"the first {rows} of {file.metadata.num_rows} rows of {str(path)!r} take "
                        f"{taken / 1e9:.1f} GB and {most / 1e9:.1f} GB of memory are available; "
                        "give a part of it"
                    )
        table = pa.Table.from_batches(read, schema)
        return datasets.Dataset(datasets.table.InMemoryTable(table.combine_chunks()))
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged file
        raise UserError(
            f"data file {str(path)!r} cannot be read ({_line(error)}); "
            "accepted: a Parquet file; write it again"
        ) from error


def _travelling_type(field: pa.Field) -> pa.DataType:
    """Return the type of a column in the ``Dataset``: columns of objects become JSON text."""
    kind = _plain_type(field.type)
    nested = field.name in NESTED and pa.types.is_nested(kind)
    return pa.string() if nested else kind


def _travelling_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    for i, field in enumerate(batch.schema):
        if field.name in NESTED and pa.types.is_nested(_plain_type(field.type)):
            rows = [
                travelling({field.name: x}, nulls=False)[field.name] for x in batch[i].to_pylist()
            ]
            batch = batch.set_column(i, field.name, pa.array(rows, pa.string()))
    return batch


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values where a type wraps another (categories, extensions)."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _join(source: str, parts: list[datasets.Dataset]) -> datasets.Dataset:
    """Put the files of a directory one after the other; a column missing in one is None there."""
    try:
        return datasets.concatenate_datasets(parts)
    except (pa.ArrowException, ValueError, TypeError):
        parts = [
            part.select_columns([c for c in part.column_names if c in _COLUMNS]) for part in parts
        ]
    try:
        return datasets.concatenate_datasets(parts)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"directory {source!r} has files whose columns do not fit together ({_line(error)}); "
            "accepted: one type a field; give the files one by one"
        ) from error


def _load_hub(source: str, split: str) -> datasets.Dataset:
    """Load a data set from the hub, or from its local cache where the hub cannot be reached."""
    match = _HUB_NAME.fullmatch(source)
    if match is None or source.lower().endswith((*_ENDINGS, ".gz", ".csv", ".tsv", ".zip")):
        raise UserError(f"data {source!r} does not exist; accepted: {_ACCEPTED}; check the path")
    name, config = match.groups()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    with _quiet(), contextlib.ExitStack() as stack:
        try:
            # Asked first: load_dataset alone tries an unreachable hub for half a minute.
            if not _cached(cache, name):
                huggingface_hub.HfApi().dataset_info(name, timeout=10)
            keep, folder = _writable(cache), None
            if not keep:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxdistill-"))
            return datasets.load_dataset(
                name, config, split=split, cache_dir=folder, keep_in_memory=not keep
            )
        except Exception as error:  # the hub's client raises errors of several libraries
            raise UserError(
                f"data {source!r} is neither a file nor a directory, and the split {split!r} of a "
                f"hub data set of that name cannot be loaded ({_line(error)}); "
                f"accepted: {_ACCEPTED}; "
                "check the name and the network, or download the data and give its path"
            ) from error


def _cached(cache: Path, name: str) -> bool:
    """Tell whether ``datasets`` may hold a data set prepared before; it spells folders its way."""
    folders = [folder.name for folder in cache.iterdir()] if cache.is_dir() else []
    wanted = re.sub(r"\W|_", "", name).lower()
    return any(re.sub(r"\W|_", "", folder).lower() == wanted for folder in folders)


def _writable(folder: Path) -> bool:
    """Tell whether a folder, or the nearest one above it that exists, may be written to."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _line(error: BaseException) -> str:
    """Give the first line of an error's message, or the error's name."""
    return (
        next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        or type(error).__name__
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the log of ``datasets``, then set them back."""
    level, shown = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
