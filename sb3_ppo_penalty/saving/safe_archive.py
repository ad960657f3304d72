"""The files that ``save`` writes, read as a stranger's: plain values and tensors, no pickle, within bounded memory."""

import io
import json
import math
import pathlib
import pickletools
import re
import reprlib
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.save_util import open_path

from sb3_ppo_penalty.arguments import quote, require

#: What ``save`` puts into its archive: values and weights. Not read are variables, which these algorithms do not have, two
#: texts for people, and the pickle that a resumable checkpoint has besides
MEMBERS = re.compile(
    r"data|(policy|policy\.optimizer|pytorch_variables)\.pth|_stable_baselines3_version|system_info\.txt|resume\.pkl"
)
#: What ``torch.save`` puts into its own; records with a dot describe the archive and are not read
TORCH_MEMBERS = re.compile(r"archive/(data\.pkl|byteorder|version|data/[0-9]+|\.\w+(/\w+)?)")
#: What a pickle of tensors by ``torch.save`` calls upon, as :mod:`pickletools` writes it
REBUILDERS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
#: Storages that it refers to, and the bytes of a number in each
STORAGES = {
    **dict.fromkeys(("torch ByteStorage", "torch CharStorage", "torch BoolStorage"), 1),
    **dict.fromkeys(("torch HalfStorage", "torch BFloat16Storage", "torch ShortStorage"), 2),
    **dict.fromkeys(("torch FloatStorage", "torch IntStorage"), 4),
    **dict.fromkeys(("torch DoubleStorage", "torch LongStorage"), 8),
}
#: Opcodes that push something without parts
ATOMS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
}
#: A tensor is a call on (a storage's name, its size, its strides, ...): tuples in a tuple
DEEPEST_TUPLE = 4
#: No more is read at once; also the largest directory of an archive, which ``zipfile`` reads whole
LARGEST_READ = 2**20
#: A pickle takes 70 bytes for each tensor of an optimizer, and 160 for each of a policy
LARGEST_PICKLE = 2**19
#: Objects that a pickle makes, two for each tensor
MOST_OBJECTS = 30_000
#: Brackets and commas in the JSON: each can become an object of a hundred bytes
MOST_JSON_PARTS = 100_000


class UnsafeFileError(ValueError):
    """A file that ``load_safe`` refuses; the message names the entry that it refuses it for."""


#: ``require`` for an entry of a file: its value may be long or hostile, so the message shows only the beginning of it
check = partial(require, error=UnsafeFileError, show=lambda value: quote(reprlib.repr(value)))


class PickleDescription(dict[str, Any]):
    """What SB3 writes beside a pickle for people to read; the pickle itself is dropped."""


class SavedModel(NamedTuple):
    """
    What a file holds; the JSON is plain but unchecked, and so are the names, shapes and values of the tensors.

    :param entries: attributes of the model, by name
    :param policy: as ``state_dict`` gave it
    :param optimizer: as ``state_dict`` gave it
    :param weight_bytes: size of the policy's tensors
    """

    entries: dict[str, Any]
    policy: Any
    optimizer: Any
    weight_bytes: int


@contextmanager
def refusing(entry: str, *passed: type[Exception]) -> Iterator[None]:
    """
    Turn what a library raises over a part of a file, whatever it is, into the one exception.

    :param entry: to name in it
    :param passed: exceptions that are not about the file
    :raises UnsafeFileError: instead
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (UnsafeFileError, *passed)):
            raise
        raise UnsafeFileError(f"`{quote(entry)}` cannot be used: {quote(f'{type(error).__name__}: {error}')}") from error


def read_model(path: str | pathlib.Path | io.BufferedIOBase, max_bytes: int) -> SavedModel:
    """
    Read what SB3's ``save`` wrote.

    :param path: as for SB3's ``load``
    :param max_bytes: what the file may unpack to
    :return: its plain values, and its tensors on the CPU
    :raises UnsafeFileError: if it holds anything else
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with refusing(str(path)), zipfile.ZipFile(_BoundedReader(file)) as archive:
            stored_or_deflated = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
            members = _checked_members(archive, "", MEMBERS, stored_or_deflated, max_bytes)
            for name in ("data", "policy.pth", "policy.optimizer.pth"):
                check(name in members, name, None, "in the file")
            entries = _parse_json(_unpacked(archive, members["data"]))
            policy, optimizer = (_tensors(archive, members[name]) for name in ("policy.pth", "policy.optimizer.pth"))
            return SavedModel(entries, policy, optimizer, members["policy.pth"].file_size)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


class _BoundedReader:
    """A file for ``zipfile`` of which little is read at once: a directory of a million entries is not taken in."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """
        :param size: in bytes; -1 for all there is
        :return: at most ``LARGEST_READ``
        :raises UnsafeFileError: if that is not enough
        """
        data: bytes = self._file.read(LARGEST_READ + 1 if size < 0 else min(size, LARGEST_READ + 1))
        check(len(data) <= LARGEST_READ, "directory of the archive", len(data), f"at most {LARGEST_READ} bytes")
        return data


def _checked_members(
    archive: zipfile.ZipFile, where: str, known: re.Pattern[str], methods: set[int], max_bytes: int
) -> dict[str, zipfile.ZipInfo]:
    """
    :param archive: whose directory alone has been read
    :param where: prefix for the names in messages
    :param known: the names that may occur, each once
    :param methods: the compression methods that may occur
    :param max_bytes: what all members together may unpack to
    :return: members by name
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.orig_filename
        check(bool(known.fullmatch(name)), where + name, name, "left out: it is none of the names that `save` writes")
        check(name not in members, where + name, name, "in the file once")
        check(not info.flag_bits & 1, where + name, "encryption", "readable")
        check(info.compress_type in methods, where + name, info.compress_type, f"packed by one of the methods {methods}")
        members[name] = info
    total = sum(info.file_size for info in members.values())
    largest = max(members, key=lambda name: members[name].file_size, default="")
    check(total <= max_bytes, where + largest, total, f"smaller: all may unpack to {max_bytes} bytes together")
    return members


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str = "") -> bytes:
    """
    :param archive: that holds it
    :param info: of a member; ``zipfile`` unpacks no more than the size given there, and compares the checksum
    :param where: prefix for the name in messages
    :return: the content
    """
    with refusing(where + info.filename), archive.open(info) as member:
        return b"".join(iter(lambda: member.read(LARGEST_READ), b""))


def _parse_json(data: bytes) -> dict[str, Any]:
    """
    :param data: JSON
    :return: entries; pickles are dropped while it is parsed
    """
    with refusing("data"):
        parts = sum(data.count(mark) for mark in b"[{,")
        # ASCII, as `save` writes it: one character beyond and Python takes four bytes for each
        check(parts <= MOST_JSON_PARTS, "data", parts, f"JSON of at most {MOST_JSON_PARTS} parts")
        hooks: dict[str, Any] = {"parse_int": _json_integer, "parse_float": _json_float, "parse_constant": _json_constant}
        entries = json.loads(data.decode("ascii"), object_pairs_hook=_json_object, **hooks)
        check(type(entries) is dict, "data", type(entries), "an object of attributes")
        return dict(entries)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        check(times == 1, name, f"{times} of them", "in the file once")
    if ":serialized:" in entry:
        del entry[":serialized:"]
        return PickleDescription(entry)
    return entry


def _json_integer(text: str) -> int:
    check(len(text) <= 20 and abs(int(text)) < 2**63, "data", text, "JSON with integers of at most 64 bits")
    return int(text)


def _json_float(text: str) -> float:
    check(math.isfinite(float(text)), "data", text, "JSON with numbers that a float can hold")
    return float(text)


def _json_constant(text: str) -> float:
    # Infinity is a `max_grad_norm`; where it is none, the arguments' own checks refuse it
    check(text != "NaN", "data", text, "JSON with numbers")
    return float(text)


def _tensors(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """
    Read what ``torch.save`` wrote.

    :param archive: that holds it
    :param info: of the member
    :return: as ``torch.load`` gives it with ``weights_only=True``, on the CPU
    """
    with refusing(info.filename):
        return th.load(_checked_copy(info.filename, _unpacked(archive, info)), map_location="cpu", weights_only=True)


def _checked_copy(entry: str, content: bytes) -> io.BytesIO:
    """
    Check an archive of ``torch.save`` with Python's reader and write it anew, so that torch's reader sees the same.

    :param entry: name in the outer file
    :param content: not compressed: it cannot unpack to more than it is
    :return: the pickle, the storages that it refers to, and the order of their bytes
    """
    where, pickle, native, copy = f"{entry}/", "archive/data.pkl", sys.byteorder.encode(), io.BytesIO()
    with zipfile.ZipFile(_BoundedReader(io.BytesIO(content))) as archive, zipfile.ZipFile(copy, "w") as checked:
        members = _checked_members(archive, where, TORCH_MEMBERS, {zipfile.ZIP_STORED}, len(content))
        check(pickle in members, where + pickle, None, "in the file")
        size = members[pickle].file_size
        check(size <= LARGEST_PICKLE, where + pickle, size, f"at most {LARGEST_PICKLE} bytes")
        _check_pickle(where + pickle, _unpacked(archive, members[pickle], where), members)
        order = members.get("archive/byteorder")
        found = _unpacked(archive, order, where) if order else native
        check(found == native, f"{where}archive/byteorder", found, f"this machine's, {native!r}")
        checked.writestr("archive/version", "3\n")
        checked.writestr("archive/byteorder", native)
        for name, info in members.items():
            if name == pickle or name.startswith("archive/data/"):
                checked.writestr(name, _unpacked(archive, info, where))
    copy.seek(0)
    return copy


def _check_pickle(entry: str, pickle: bytes, members: dict[str, zipfile.ZipInfo]) -> None:
    """
    Follow a pickle without making anything of it but tuples, to see that it only names and joins tensors.

    ``weights_only=True`` lets more pass than that: ``bytearray(10**10)``, which is a call that takes 10 GB; a tuple in a
    tuple in ... as a dictionary's key, whose hash overflows the C stack. And it is left to torch's reader whether a storage
    may be larger than its record.

    :param entry: to name
    :param pickle: of protocol 2
    :param members: of the archive, which hold the storages
    """
    nothing = (0, None)
    stack: list[tuple[int, Any]] = []  # how deep tuples are nested, and the value where it matters
    marks: list[int] = []
    memo: dict[int, tuple[int, Any]] = {}
    objects = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        objects += name in ("EMPTY_LIST", "EMPTY_DICT", "REDUCE")
        if name in ATOMS:
            stack.append(nothing if argument is None else (0, argument))
        elif name == "GLOBAL":
            check(argument in REBUILDERS | STORAGES.keys(), entry, argument, "a pickle of tensors alone")
            stack.append((0, argument))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name.startswith("TUPLE"):
            start = marks.pop() if name == "TUPLE" else len(stack) - int(name[-1])
            parts = stack[start:]
            depth = 1 + max((depth for depth, _ in parts), default=0)
            check(depth <= DEEPEST_TUPLE, entry, depth, f"a pickle of tuples in tuples at most {DEEPEST_TUPLE} deep")
            stack[start:] = [(depth, tuple(value for _, value in parts))]
        elif name in ("APPENDS", "SETITEMS"):
            del stack[marks.pop() :]
        elif name == "BINPERSID":
            _check_storage(entry, stack.pop()[1], members)
            stack.append(nothing)
        elif name in ("APPEND", "SETITEM", "BUILD", "REDUCE"):
            # Into the list, the dictionary or the object below; a call's result takes the function's place
            del stack[-2 if name == "SETITEM" else -1 :]
        else:
            check((name == "PROTO" and argument == 2) or name == "STOP", entry, name, "a pickle as `torch.save` writes it")
    check(objects <= MOST_OBJECTS, entry, objects, f"a pickle of at most {MOST_OBJECTS} objects")


def _check_storage(entry: str, identity: Any, members: dict[str, zipfile.ZipInfo]) -> None:
    """
    :param entry: to name
    :param identity: (a word, type, name, device, number of elements), as ``torch.save`` writes them
    :param members: of the archive
    """
    fits = False
    if type(identity) is tuple and len(identity) == 5 and type(identity[2]) is str and identity[1] in STORAGES:
        record = members.get(f"archive/data/{identity[2]}")
        fits = record is not None and identity[4] == record.file_size / STORAGES[identity[1]]
    check(fits, entry, identity, "a pickle of tensors whose storages have the sizes of their records")
