"""Files of records for --data, which envs/questions.py and envs/problems.py read.

A file is a JSON list, JSON lines, one JSON object or, if its name ends in .parquet, Parquet (pip
install pyarrow). A folder stands for the files in it and below it that end in .json, .jsonl or
.parquet, in the order of their paths."""

import importlib.util
import json
import random
from pathlib import Path


def read_records(args, parse, wanted: str) -> list:
    """What parse(record) makes of the records of --data: items with a `text`, which is the prompt.
    None is left out, and so is an item whose text an earlier one has. wanted: a word on formats.

    parse raises ValueError("field: what is wrong") for a bad record. With --skip-bad-records these
    are left out as well; else ValueError says the first one's number, counted from 1, and field."""
    if not args.data:
        raise ValueError("give --data, a file or a folder")
    files = [Path(args.data)]
    if files[0].is_dir():
        files = sorted(files[0].rglob("*"))
        files = [file for file in files if file.suffix in (".json", ".jsonl", ".parquet")]
        if not files:
            raise ValueError("no file in it ends in .json, .jsonl or .parquet")
    found, texts, bad, total, repeated = [], set(), [], 0, 0
    for file in files:
        place = f"{file.name}: " if len(files) > 1 else ""
        for number, record in enumerate(records_of(file, place), 1):
            total += 1
            try:
                item = parse(as_dict(record))
            except Exception as error:  # noqa: BLE001 (a file may hold anything)
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                bad.append(f"{place}record {number}: {kind}{' '.join(str(error).split())[:120]}")
                if args.skip_bad_records:
                    continue
                raise ValueError(f"{bad[0]} (want {wanted}, or --skip-bad-records)") from None
            if item is None:
                continue
            text = " ".join(item.text.split())
            if text in texts:
                repeated += 1
                continue
            texts.add(text)
            found.append(item)
    if bad:
        print(f"{len(bad)} of {total} records left out, the first: {bad[0]}")
    if repeated:
        print(f"{repeated} of {total} records left out, as an earlier one has the same text")
    if len(found) < 2:
        raise ValueError(f"want two records of use or more ({wanted}), as one is held out")
    return found


def records_of(file: Path, place: str) -> list:
    """The records of a file, those of JSON lines as text. ValueError, which begins with `place`, if
    it cannot be read."""
    try:
        if file.suffix == ".parquet":
            if not importlib.util.find_spec("pyarrow"):
                raise ImportError("to read Parquet, pip install pyarrow")
            from pyarrow import parquet

            with file.open("rb") as opened:
                return parquet.read_table(opened).to_pylist()
        text = file.read_text(encoding="utf-8-sig").strip()
        lines = [line for line in text.split("\n") if line.strip()]
        if text[:1] == "[":
            return json.loads(text)
        over_several = bool(lines) and lines[0].strip() == "{"  # one object, indented
        return [text] if over_several else lines
    except ImportError as error:
        raise ValueError(f"{place}{error}") from None
    except OSError as error:
        raise ValueError(f"{place}{error.strerror or error}; give a data file") from None
    except (ValueError, RecursionError) as error:
        kind = "Parquet" if file.suffix == ".parquet" else "JSON"
        raise ValueError(f"{place}it cannot be read as {kind} ({error})") from None


def as_dict(record) -> dict:
    """A record, if it still is a line of JSON, from this."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON ({error})") from None
    if isinstance(record, dict):
        return record
    raise ValueError("it is no JSON object with fields")


def text_of(record: dict, *names: str) -> str:
    """What the first of these fields that the record has says; a whole number becomes text.
    ValueError names the field if it is missing, empty, or neither text nor a whole number."""
    has = [name for name in names if name in record]
    if not has:
        raise ValueError(f"{', '.join(names)}: it is missing")
    name = next((name for name in has if record[name] is not None), has[0])
    value = record[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: want a text, not {json.dumps(value, default=str)[:60]}")
    return value


def split_data(items: list, most: int) -> tuple[list, list]:
    """To train on, and held out: a fifth, rounded up, at most so many; the same for every seed."""
    items = random.Random(0).sample(items, len(items))
    held_out = min(most, -(-len(items) // 5))
    return items[held_out:], items[:held_out]
