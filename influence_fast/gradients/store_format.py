"""Per-sample gradients on disk: written shard by shard, resumed, checked while they are read.

A store is a folder of ``manifest.json``, ``journal``, shards ``shard-00000.safetensors``, ``shard-00001.safetensors``, ...,
and ``ids.bin`` where rows have names. Every shard but the last holds ``shard_rows`` consecutive rows. Nothing is ever
unpickled. All numbers are little-endian, all text is UTF-8.

**Manifest**, written once: a JSON object ``format``, ``version`` (2), ``requires`` (what a reader must know beside this
page: none so far, ``tombstones``, ``segments`` and ``factors`` are set aside; refuse what you do not know, and ignore other
keys), ``model`` (SHA-256 of the weights), ``projection`` (text), ``layers`` (by name: ``shape`` (out, in), ``dim``,
``matrices`` with the identifier of each random matrix), ``dtype``, ``loss``, ``rows``, ``shard_rows``, ``block`` (16384),
``ids`` (null: row numbers), ``settings`` of the build, ``facts`` (optional: which rows capture was verified on, how many
trained numbers the layers cover of how many), and ``seal``: the SHA-256 of all bytes of the file before its value, which
with ``"``, ``}`` and two line ends is its last 68 bytes.

**Journal**, only ever added to: one JSON object a line, in any order while a store is being built, in that of the rows when
it is done. A line that does not end is not there yet.

===========  ==============================================================================================
key          content
===========  ==============================================================================================
``kind``     ``shard``; a reader refuses others
``segment``  0; rows that are appended later are counted from 1
``file``     name of the shard
``first``    its first row
``rows``     how many
``bytes``    length of the file
``sha256``   of the file
``blocks``   XXH3 (64 bits, hexadecimal) of its table of checksums
``settings`` SHA-256 of the manifest's content, facts aside: which store it belongs to
``before``   ``seal`` of the line before; of the first line: ``settings``
``seal``     SHA-256 of all bytes of the line before its value, which with ``"}`` ends the line
===========  ==============================================================================================

**Shard**, byte by byte (the safetensors format):

=================  =========================================================================================
bytes              content
=================  =========================================================================================
0 .. 8             H, the length of the header: unsigned
8 .. 8 + H         header: JSON ``{name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}}``, and
                   ``__metadata__`` with ``file``, ``first``, ``rows`` and ``settings`` as in the journal
8 + H + begin ..   the tensor: C-contiguous, offsets counted from the header's end; no gaps
=================  =========================================================================================

==============================  ==========  ==================================================================
tensor                          dtype       content
==============================  ==========  ==================================================================
``LAYER``                       F32 F16     ``(rows, dim)`` gradients, each out-major ``(k_out, k_in)``, a sketch,
                                BF16 I8     or the whole ``(out, in)`` gradient
``@scale/LAYER``                F32         ``(rows,)`` int8 and float16, powers of two there: gradient = scale * number;
                                            absent in float16 shards of version 0.1, where it is 1
``@sqnorm/LAYER``               F64         ``(rows,)`` ``|g|^2`` of the gradient before it was rounded to dtype
``@column/NAME``                any         ``(rows,)`` ``loss``, ``correct``, ``prediction``
``@blocks``                     U64         last: XXH3 (64 bits, seed 0) of every 16,384 bytes of the file before it
==============================  ==========  ==================================================================

**Names of rows**: the manifest's ``ids`` gives ``file``, ``type``, ``width``, ``bytes`` (names alone), ``sha256`` (of these
bytes) and ``blocks``. Names of one width lie side by side; of different ones (``width`` null) behind ``rows + 1`` int64
offsets into the text that follows. ``type`` is ``int64``, ``utf8`` (halves of surrogate pairs as in UTF-8's scheme), or
``json`` where numbers and text are mixed. A table of checksums, as of a shard, ends the file.

A shard is written aside, fsynced and renamed; its line in the journal follows. So what the journal names is whole, and a
build that was killed goes on with the shards that are missing. Adding a shard writes the shard and one line, however many
there are. Version 1 had all of it in ``manifest.json``, without checksums of blocks: such a store opens, each shard is
hashed as a whole when it is first read, and ``influence-fast upgrade`` rewrites it.

A reader that checks what it reads, in plain NumPy::

    import hashlib, json, pathlib
    import numpy as np


    def read_store(folder, layer):
        folder, parts, before = pathlib.Path(folder), {}, None
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        assert hashlib.sha256(raw[:-68]).hexdigest() == manifest["seal"] and not manifest["requires"]
        for line in (folder / "journal").read_bytes().splitlines():
            shard = json.loads(line)
            assert hashlib.sha256(line[:-66]).hexdigest() == shard["seal"] and shard["kind"] == "shard"
            assert before in (None, shard["before"])
            before = shard["seal"]
            raw = np.memmap(folder / shard["file"], dtype=np.uint8, mode="r")
            assert len(raw) == shard["bytes"] and hashlib.sha256(raw).hexdigest() == shard["sha256"]
            size = int(raw[:8].view("<u8")[0])
            header = json.loads(bytes(raw[8 : 8 + size]))
            entry = header[layer]
            begin, end = entry["data_offsets"]
            data = raw[8 + size + begin : 8 + size + end]
            dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}[entry["dtype"]]
            rows = data.view(dtype).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                rows = (rows.astype("<u4") << 16).view("<f4")
            if (scale := header.get("@scale/" + layer)) is not None:
                begin, end = scale["data_offsets"]
                rows = rows * raw[8 + size + begin : 8 + size + end].view("<f4")[:, None]
            parts[shard["first"]] = rows
        rows = np.concatenate([parts[first] for first in sorted(parts)])
        assert len(rows) == manifest["rows"]
        return rows
"""

from __future__ import annotations

FORMAT, VERSION = "influence_fast.gradients", 2
MANIFEST, JOURNAL = "manifest.json", "journal"
