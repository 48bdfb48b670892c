"""Write into a video what made it, and read that again from any file, however damaged or hostile.

Two places hold it. ffmpeg writes the title and the prompt as the standard tags of each container, which players show.
(With `-movflags use_metadata_tags` it would move them to keys that few players read, and tags of other names are
dropped without it.) All else is in an XMP packet, which is added to the end of an mp4 as a box that players skip:
exiftool, and ffprobe with `-export_xmp 1`, read it, and it has room for settings that no command line has.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import UUID
from xml.etree import ElementTree
from xml.parsers import expat

from pusa.system.files import parse_json
from pusa.video.ffmpeg import open_regular_file

# https://cv.iptc.org/newscodes/digitalsourcetype: "created algorithmically using a model trained on sampled content"
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_BOX = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes  # XMP specification part 3, section 1.1.4, "MPEG-4"
MAX_WRITTEN, MAX_PACKET = 4 << 20, 8 << 20  # bytes of settings as JSON, and of a packet that is read
MAX_BOXES, MAX_DEPTH = 10_000, 32  # of a file that is read: boxes at its top; elements, or values, inside each other
MAX_PACKETS = 8  # that are read: other programs may add their own
_NOT_IN_XML = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # https://www.w3.org/TR/xml/#charsets
NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "pusa": "urn:pusa:",
}
FIELDS = {  # of `Provenance`: where they are in a packet
    "title": ("dc", "title"),
    "prompt": ("dc", "description"),
    "source_type": ("Iptc4xmpExt", "DigitalSourceType"),
    "maker": ("xmp", "CreatorTool"),
    "facts": ("pusa", "specification"),
}
LANGUAGES = ("title", "prompt")  # fields that may have a text for each language


@dataclass(frozen=True)
class Provenance:
    """What a video says about itself. `facts` is everything that it was made of, as JSON values; None: not embedded."""

    title: str
    prompt: str = ""
    maker: str = ""  # "pusa" and its version
    facts: Mapping[str, Any] | None = None
    source_type: str = AI_MADE

    def tags(self) -> list[str]:
        """Return ffmpeg's arguments for the tags of one of its outputs."""
        tags = {"title": self.title, "comment": self.prompt, "description": self.prompt}
        return [part for name, text in tags.items() if text for part in ("-metadata", f"{name}={_in_xml(text)}")]

    def packet(self) -> bytes:
        """Return the XMP packet. Settings of more than `MAX_WRITTEN` bytes are left out by name."""
        facts = {**self.facts} if self.facts else {}
        for key in sorted(facts, key=lambda key: -len(_as_json(facts[key]))):
            if len(_as_json(facts)) > MAX_WRITTEN:
                facts["left_out"] = sorted([*facts.get("left_out", ()), key])
                del facts[key]
        root = ElementTree.Element(_name("x", "xmpmeta"))
        about = ElementTree.SubElement(ElementTree.SubElement(root, _name("rdf", "RDF")), _name("rdf", "Description"))
        about.set(_name("rdf", "about"), "")
        for field, (prefix, tag) in FIELDS.items():
            if text := (_as_json(facts) if facts else "") if field == "facts" else getattr(self, field):
                element = ElementTree.SubElement(about, _name(prefix, tag))
                if field in LANGUAGES:
                    element = ElementTree.SubElement(element, _name("rdf", "Alt"))
                    element = ElementTree.SubElement(element, _name("rdf", "li"))
                    element.set("xml:lang", "x-default")
                element.text = _in_xml(text)
        body = ElementTree.tostring(root, encoding="utf-8", xml_declaration=False)
        start = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'.encode()
        return start + body + b'\n<?xpacket end="r"?>'


for _prefix, _address in NAMESPACES.items():
    ElementTree.register_namespace(_prefix, _address)


def _name(prefix: str, tag: str) -> str:
    return f"{{{NAMESPACES[prefix]}}}{tag}"


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))  # ASCII: nothing that XML does not allow


def _in_xml(text: str) -> str:
    """Return a text with spaces for the characters that XML, and command lines, cannot hold."""
    return _NOT_IN_XML.sub(" ", text)


def append_packet(path: Path, provenance: Provenance) -> None:
    """Add the packet to the end of an mp4 that nobody else writes.

    Raises:
        OSError: it cannot be written.
    """
    packet = XMP_BOX + provenance.packet()
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + len(packet), b"uuid") + packet)


def read_provenance(path: Path) -> Provenance | None:
    """Return what an mp4 says about itself; None if it is no mp4, or no packet in it can be read.

    At most `MAX_BOXES` boxes are looked at, and of each packet `MAX_PACKET` bytes are read. The texts are untrusted.

    Raises:
        MediaError: the file cannot be opened.
        OSError: it cannot be read.
    """
    with open_regular_file(path) as handle, open(handle, "rb", closefd=False) as file:
        for packet in _packets(file):
            if found := _read_packet(packet):
                return found
    return None


def _packets(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the XMP packets at the top of an mp4, at most `MAX_PACKETS`, the last one in the file first."""
    end, start, found = file.seek(0, 2), 0, list[tuple[int, int]]()
    for _ in range(MAX_BOXES):
        file.seek(start)
        head = file.read(32)
        if len(head) < 8:
            break
        (size, kind), used = struct.unpack(">I4s", head[:8]), 8
        if size == 1 and len(head) >= 16:  # the size follows, in 64 bits
            size, used = struct.unpack(">Q", head[8:16])[0], 16
        size = size or end - start  # 0: up to the end of the file
        if size < used or start + size > end:
            break
        if kind == b"uuid" and head[used : used + 16] == XMP_BOX and size <= MAX_PACKET:
            found.append((start + used + 16, start + size))
        start += size
    for first, last in reversed(found[-MAX_PACKETS:]):
        file.seek(first)
        yield file.read(max(0, last - first))


def _read_packet(packet: bytes) -> Provenance | None:
    """Return what a packet says; None if it is damaged, declares entities, or says nothing of interest."""
    reader = _PacketReader()
    try:
        reader.parser.Parse(packet, True)
    except (expat.ExpatError, ValueError):  # ValueError: of `_refuse`
        return None
    if not reader.texts:
        return None
    title, prompt, source_type, maker, written = ("".join(reader.texts.get(field, ())).strip() for field in FIELDS)
    facts = parse_json(written.encode()) if len(written) <= MAX_WRITTEN else None
    usable = isinstance(facts, dict) and _is_plain(facts)
    return Provenance(title, prompt, maker, facts if usable else None, source_type)


def _is_plain(facts: Any) -> bool:
    """Return whether JSON values are few enough levels deep to be printed, and all their numbers finite."""
    values = [facts]
    for _ in range(MAX_DEPTH):
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            return False
        lists = [
            value.values() if isinstance(value, dict) else value for value in values if isinstance(value, dict | list)
        ]
        values = [inner for one in lists for inner in one]
    return not values


class _PacketReader:
    """Collects the texts of the known elements, the first of each name. Nothing else is kept in memory."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}
        self._names = {" ".join((NAMESPACES[prefix], tag)): field for field, (prefix, tag) in FIELDS.items()}
        self._field, self._at, self._depth = "", 0, 0
        self.parser = expat.ParserCreate("utf-8", " ")  # whatever encoding the packet states
        self.parser.StartElementHandler, self.parser.EndElementHandler = self._start, self._end
        self.parser.CharacterDataHandler = self._add
        self.parser.StartDoctypeDeclHandler = self.parser.EntityDeclHandler = _refuse

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _refuse()
        field = self._names.get(name, "")
        if field and not self._field and field not in self.texts:
            self._field, self._at, self.texts[field] = field, self._depth, []

    def _end(self, name: str) -> None:
        if self._field and self._depth == self._at:
            self._field = ""
        self._depth -= 1

    def _add(self, text: str) -> None:
        if self._field:
            self.texts[self._field].append(text)


def _refuse(*declaration: object) -> None:
    raise ValueError("a packet has no document type, no entities, and few elements inside each other")
