"""What the pickle in a torch file may say, seen before anything of it is built."""

import pickletools
import re

MAX_OPCODES = 1000  # a real one has about 60; nesting can be no deeper than this
PUTS = {"BINPUT", "LONG_BINPUT"}
GETS = {"BINGET", "LONG_BINGET"}
NAMES = {"GLOBAL", "BINUNICODE"}
OPCODES = PUTS | GETS | NAMES | {
    "PROTO", "STOP", "MARK", "REDUCE", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
GLOBALS = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")


def require_tensors(pickled: bytes) -> None:
    """Refuse a pickle that is more than a few tensors in mappings and lists.

    torch's restricted unpickler runs no foreign code, but it hashes keys, and a key may be a tuple that holds another
    twice, which holds another twice: few bytes, and a hash that never ends. So nothing but names may be used twice;
    then what is built is no larger than what is said, and that is short.

    Raises:
        ValueError: it is more, or no pickle.
    """
    names = set()  # places of the memo that hold a text or a global
    last = ""  # the opcode that put the stack's last item there
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled), 1):
        name = opcode.name
        if count > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")
        if name not in OPCODES or (name == "GLOBAL" and not GLOBALS.fullmatch(str(argument))):
            raise ValueError(f"its pickle has {name} {argument or ''!r:.80}, which plain tensors do not need")
        if name in GETS and argument not in names:
            raise ValueError("its pickle uses something twice, which plain tensors do not need")
        if name not in PUTS:
            last = name
        elif last in NAMES:
            names.add(argument)
        else:
            names.discard(argument)
