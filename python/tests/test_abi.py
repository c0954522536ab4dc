"""The binding says what pegaflow.h says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pegaflow.client import _abi, constants
from pegaflow.client._library import library

from .support import ROOT

HEADER = ROOT / "client-c" / "include" / "pegaflow.h"
PREFIXES = {
    "OP_": constants.Op,
    "REASON_": constants.Reason,
    "STATE_": constants.State,
    "MODE_": constants.Mode,
    "MEMORY_": constants.Memory,
    "ORDER_": constants.OrderKind,
    "FETCH_": constants.Fetch,
    "LOG_": constants.LogLevel,
}
ALONE = {"ABI_VERSION": _abi.ABI_VERSION, "SCHEDULER": constants.SCHEDULER}
SWITCHES = {"DEFAULT": 0, "ON": 1, "OFF": 2}


def header() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def test_every_constant_of_the_header_has_its_number_here() -> None:
    defines = {
        name: int(number.strip("()"))
        for name, number in re.findall(r"^#define PEGA_(\w+) (\S+)", header(), re.MULTILINE)
    }
    here = {f"{prefix}{one.name}": int(one) for prefix, kind in PREFIXES.items() for one in kind}
    here |= {one.name: int(one) for one in constants.Status} | ALONE | SWITCHES
    assert defines == here


def test_every_function_of_the_header_is_bound_and_used_or_left_out_with_a_reason() -> None:
    declared = set(re.findall(r"\b(pega_\w+)\(", header()))
    assert declared == set(_abi.PROTOTYPES)
    folder = Path(_abi.__file__).parent
    sources = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "_abi.py")
    used = set(re.findall(r"\.(pega_\w+)\b", sources)) | {"pega_abi_version"}
    used -= {struct.__name__ for struct in _abi.STRUCTS}
    assert declared == used | set(_abi.LEFT_OUT)
    assert not used & set(_abi.LEFT_OUT)


def test_every_exported_symbol_is_bound() -> None:
    exported = set(re.findall(r"\bpega_\w+", (ROOT / "client-c" / "pegaflow.map").read_text()))
    assert exported == set(_abi.PROTOTYPES)
    assert all(hasattr(library(), name) for name in exported)


C_TYPES = {
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "int32_t": ctypes.c_int32,
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
}


def test_every_function_has_the_arguments_of_the_header() -> None:
    for kind, stars, name, arguments in re.findall(
        r"^((?:const )?\w+) ?(\**) ?(pega_\w+)\(([^)]*)\);", header(), re.MULTILINE
    ):
        result, types = _abi.PROTOTYPES[name]
        assert result is (ctypes.c_char_p if stars else C_TYPES[kind]), name
        declared = [] if arguments == "void" else [one.strip() for one in arguments.split(",")]
        assert len(declared) == len(types), name
        for text, given in zip(declared, types, strict=True):
            base = re.sub(r"\bconst\b", "", text).split()[0].rstrip("*")
            if "*" not in text:
                assert given is C_TYPES[base], f"{name}: {text}"
            elif given is not ctypes.c_void_p:
                pointed = given._type_
                assert pointed in (C_TYPES.get(base), getattr(_abi, base, None)) or (
                    pointed is ctypes.c_void_p and "**" in text
                ), f"{name}: {text}"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_structs_have_the_sizes_and_offsets_of_the_compiler(tmp_path: Path) -> None:
    lines = []
    for struct in _abi.STRUCTS:
        name = struct.__name__
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}),'
                f" sizeof((({name} *)0)->{field}));"
            )
    program = tmp_path / "layout.c"
    program.write_text(
        "#include <pegaflow.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(lines) + "\n}\n"
    )
    binary = tmp_path / "layout"
    subprocess.run(["cc", "-I", HEADER.parent, "-o", binary, program], check=True)
    told = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    here = []
    for struct in _abi.STRUCTS:
        here.append(f"{struct.__name__} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            here.append(f"{struct.__name__}.{field} {at.offset} {at.size}")
    assert told.split("\n")[:-1] == here


def test_structs_have_the_fields_of_the_header() -> None:
    structs = dict(
        re.findall(r"typedef struct (pega_\w+) \{(.*?)\} \1;", header(), flags=re.DOTALL)
    )
    del structs["pega_hash"]
    assert set(structs) == {struct.__name__ for struct in _abi.STRUCTS}
    for struct in _abi.STRUCTS:
        fields = re.findall(r"(\w+)(?:\[\d+\])?;", structs[struct.__name__])
        assert fields == [name for name, *_ in struct._fields_], struct.__name__


def test_labels_are_those_of_the_library() -> None:
    lib = library()
    for kind, label in (
        (constants.Status, lib.pega_status_label),
        (constants.Reason, lib.pega_reason_label),
        (constants.Op, lib.pega_op_label),
    ):
        assert [label(int(one)).decode() for one in kind] == [one.name.lower() for one in kind]


def test_a_number_without_a_name_keeps_its_value() -> None:
    status = constants.Status(77)
    assert (status, status.name) == (77, "UNKNOWN_77")
    with pytest.raises(ValueError, match="not a valid Status"):
        constants.Status(-1)


def test_the_client_is_imported_without_numpy_torch_or_library() -> None:
    code = (
        "import sys, pegaflow.client;"
        "assert not {'numpy', 'torch'} & set(sys.modules);"
        "from pegaflow.client import _library; assert _library._loaded is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "python")
