"""Read a file that ``save`` wrote without trusting it: plain values and tensors, no pickles, within bounded memory."""

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

#: Members of the archive that ``save`` writes. ``data`` (JSON), the policy and its optimizer are read. Never read are
#: variables, which these algorithms do not have, two texts for people, and the pickle of a resumable checkpoint
MEMBERS = re.compile(
    r"data|(policy|policy\.optimizer|pytorch_variables)\.pth|_stable_baselines3_version|system_info\.txt|resume\.pkl"
)
NEEDED_MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")
#: Members of the archive that ``torch.save`` writes; records with a dot describe the archive and are not read
TORCH_MEMBERS = re.compile(r"archive/(data\.pkl|byteorder|version|data/[0-9]+|\.\w+(/\w+)?)")
#: Functions that a pickle of tensors by ``torch.save`` calls, as :mod:`pickletools` writes them
REBUILDERS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
#: Storage types that such a pickle refers to -> bytes per element
STORAGES = {
    **dict.fromkeys(("torch ByteStorage", "torch CharStorage", "torch BoolStorage"), 1),
    **dict.fromkeys(("torch HalfStorage", "torch BFloat16Storage", "torch ShortStorage"), 2),
    **dict.fromkeys(("torch FloatStorage", "torch IntStorage"), 4),
    **dict.fromkeys(("torch DoubleStorage", "torch LongStorage"), 8),
}
#: Opcodes that push a value which has no parts
ATOMS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
}
#: Opcodes that take values off the stack -> how many; None for all values above the last mark. The list, dictionary, object
#: or function below stays: it stands for the result
TAKEN: dict[str, int | None] = {
    **dict.fromkeys(("TUPLE1", "BINPERSID", "APPEND", "BUILD", "REDUCE"), 1),
    **dict.fromkeys(("TUPLE2", "SETITEM"), 2),
    "TUPLE3": 3,
    **dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS")),
}
#: Opcodes that make an object which takes memory
MAKERS = {"EMPTY_LIST", "EMPTY_DICT", "REDUCE"}
#: A tensor is a call on (storage identity, offset, shape, strides, ...): tuples in a tuple
DEEPEST_TUPLE = 4
#: Bytes that are read at once; also the largest directory of an archive, which ``zipfile`` reads whole
LARGEST_READ = 2**20
#: Bytes; a pickle takes 70 of them for each tensor of an optimizer and 160 for each of a policy
LARGEST_PICKLE = 2**19
#: Objects in a pickle, two for each tensor
MOST_OBJECTS = 30_000
#: Brackets and commas in the JSON: each can become an object of a hundred bytes
MOST_JSON_PARTS = 100_000


class UnsafeFileError(ValueError):
    """Signal a file that ``load_safe`` refuses; the message names the entry at fault."""


#: ``require`` for an entry of a file: its value may be long or hostile, so the message shows only the beginning of it
check = partial(require, error=UnsafeFileError, show=lambda value: quote(reprlib.repr(value)))


class PickleDescription(dict[str, Any]):
    """The readable texts that SB3 saves beside a pickle; the pickle itself is dropped."""


class SavedModel(NamedTuple):
    """
    The contents of a model file; types are plain, but names, values and shapes are unchecked.

    :param entries: attributes of the model, by name
    :param policy: the policy's ``state_dict``
    :param optimizer: the optimizer's ``state_dict``
    :param weight_bytes: size of the policy's tensors in the file
    """

    entries: dict[str, Any]
    policy: Any
    optimizer: Any
    weight_bytes: int


@contextmanager
def refusing(entry: str, *passed: type[Exception]) -> Iterator[None]:
    """
    Turn whatever a library raises over a part of a file into an ``UnsafeFileError``.

    :param entry: the part of the file that the message names
    :param passed: exceptions that are not about the file and pass unchanged
    :raises UnsafeFileError: instead of any other exception
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
            members = _checked_members(archive, "", MEMBERS, {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}, max_bytes)
            for name in NEEDED_MEMBERS:
                check(name in members, name, None, "in the file")
            entries = _parse_json(_unpacked(archive, members["data"]))
            policy, optimizer = (_tensors(name, _unpacked(archive, members[name])) for name in NEEDED_MEMBERS[1:])
            return SavedModel(entries, policy, optimizer, members["policy.pth"].file_size)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


class _BoundedReader:
    """Let ``zipfile`` read little at once, so that a directory of a million entries is refused before it is parsed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """
        Read some bytes, or all that are left.

        :param size: in bytes; -1 for all that are left
        :return: at most ``LARGEST_READ`` bytes
        :raises UnsafeFileError: if more were asked for and are there
        """
        data: bytes = self._file.read(LARGEST_READ + 1 if size < 0 else min(size, LARGEST_READ + 1))
        check(len(data) <= LARGEST_READ, "directory of the archive", len(data), f"at most {LARGEST_READ} bytes")
        return data


def _checked_members(
    archive: zipfile.ZipFile, where: str, known: re.Pattern[str], methods: set[int], max_bytes: int
) -> dict[str, zipfile.ZipInfo]:
    """
    Check the names and sizes in an archive's directory, before any member is unpacked.

    :param archive: opened, which reads the directory alone
    :param where: prefix for the names in messages
    :param known: pattern of the names that may occur, each once
    :param methods: compression methods that may occur
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
    """Unpack a member; ``zipfile`` gives no more bytes than the directory states, and compares the checksum."""
    with refusing(where + info.filename), archive.open(info) as member:
        return b"".join(iter(lambda: member.read(LARGEST_READ), b""))


def _parse_json(data: bytes) -> dict[str, Any]:
    """Parse the JSON of the model's attributes and drop the pickles in it."""
    with refusing("data"):
        parts = sum(data.count(mark) for mark in b"[{,")
        check(parts <= MOST_JSON_PARTS, "data", parts, f"JSON of at most {MOST_JSON_PARTS} parts")
        hooks: dict[str, Any] = {"parse_int": _json_integer, "parse_float": _json_float, "parse_constant": _json_constant}
        # ASCII, as `save` writes it: one character beyond and Python takes four bytes for each
        entries = json.loads(data.decode("ascii"), object_pairs_hook=_json_object, **hooks)
        check(type(entries) is dict, "data", type(entries), "an object of attributes")
        return dict(entries)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of distinct names; a ``PickleDescription`` where a pickle is among them."""
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
    # Infinity is a valid `max_grad_norm`; where it is not allowed, the arguments' own checks refuse it
    check(text != "NaN", "data", text, "JSON with numbers")
    return float(text)


def _tensors(entry: str, content: bytes) -> Any:
    """Read what ``torch.save`` wrote, as ``torch.load`` with ``weights_only=True`` does, onto the CPU."""
    with refusing(entry):
        return th.load(_checked_copy(entry, content), map_location="cpu", weights_only=True)


def _checked_copy(entry: str, content: bytes) -> io.BytesIO:
    """
    Check an archive of ``torch.save`` with Python's reader and write it anew, so that torch's reader sees the same.

    :param entry: name in the outer file
    :param content: the archive; nothing in it is compressed, so it cannot unpack to more than it is
    :return: an archive of the pickle, the storages that it refers to, and their byte order
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
    Simulate a pickle's stack, building only tuples, to see that it does nothing but name and join tensors.

    ``weights_only=True`` alone lets more pass: ``bytearray(10**10)``, a call that takes 10 GB; a dictionary key of tuples
    nested so deep that hashing it overflows the C stack. It also does not compare a storage's size with its record's.

    :param entry: the name for messages
    :param pickle: of protocol 2
    :param members: of the archive; they hold the storages
    """
    nothing = (0, None)  # one for all: a pickle can push half a million
    stack: list[tuple[int, Any]] = []  # depth of nested tuples; the value, or None where it does not matter
    marks: list[int] = []
    memo: dict[int, tuple[int, Any]] = {}
    objects = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        objects += name in MAKERS
        taken: list[tuple[int, Any]] = []
        if name in TAKEN:
            count = TAKEN[name]
            start = marks.pop() if count is None else len(stack) - count
            taken, stack[start:] = stack[start:], []
        if name in ATOMS:
            stack.append(nothing if argument is None else (0, argument))
        elif name == "GLOBAL":
            check(argument in REBUILDERS | STORAGES.keys(), entry, argument, "a pickle of tensors alone")
            stack.append((0, argument))
        elif name.startswith("TUPLE"):
            depth = 1 + max((depth for depth, _ in taken), default=0)
            check(depth <= DEEPEST_TUPLE, entry, depth, f"a pickle of tuples in tuples at most {DEEPEST_TUPLE} deep")
            stack.append((depth, tuple(value for _, value in taken)))
        elif name == "BINPERSID":
            _check_storage(entry, taken[0][1], members)
            stack.append(nothing)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in TAKEN:
            check((name == "PROTO" and argument == 2) or name == "STOP", entry, name, "a pickle as `torch.save` writes it")
    check(objects <= MOST_OBJECTS, entry, objects, f"a pickle of at most {MOST_OBJECTS} objects")


def _check_storage(entry: str, identity: Any, members: dict[str, zipfile.ZipInfo]) -> None:
    """
    Check that a storage is as large as the record that holds it.

    :param entry: the name for messages
    :param identity: a word, type, name, device and number of elements, as ``torch.save`` writes them
    :param members: of the archive
    """
    fits = False
    if type(identity) is tuple and len(identity) == 5 and type(identity[2]) is str and identity[1] in STORAGES:
        record = members.get(f"archive/data/{identity[2]}")
        fits = record is not None and identity[4] == record.file_size / STORAGES[identity[1]]
    check(fits, entry, identity, "a pickle of tensors whose storages have the sizes of their records")
