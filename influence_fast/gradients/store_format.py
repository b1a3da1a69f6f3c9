"""Per-sample gradients on disk: written shard by shard, resumed, checked while they are read.

A store is a folder of ``manifest.json``, ``journal``, shards ``shard-00000.safetensors``, ``shard-00001.safetensors``, ...,
and ``ids.bin`` where rows have names. Every shard but the last holds ``shard_rows`` consecutive rows. Rows that are appended
are *segments*, folders within that are stores themselves; rows that are deleted are named by a file of *tombstones*.
Nothing is ever unpickled. All numbers are little-endian, all text is UTF-8.

**Manifest**, replaced as a whole when rows are appended, deleted or compacted, and never otherwise: a JSON object
``format``, ``version`` (2), ``requires`` (what else a reader must know: ``block_scales``, ``factors``, ``segments`` and
``tombstones`` where there are any; refuse what you do not know, and ignore other keys), ``model`` (SHA-256 of the
weights), ``projection`` (text), ``layers`` (by name: ``shape`` (out, in), ``dim``, ``matrices`` with the identifier of
each random matrix, and ``out`` where the layer is kept as factors), ``factors`` (c, only where rows are kept as factors;
these are float32 or have ``block_scales``), ``dtype`` (float32, float16, bfloat16, int8), ``block_scales`` (only where
numbers that follow one another in a row share a scale: ``bits`` of a code, 4 or 8, and ``numbers``, 32; ``dtype`` is
int8), ``loss``, ``rows``, ``shard_rows``, ``block`` (16384), ``ids`` (null: row numbers), ``settings`` of the build,
``facts`` (optional: which rows capture was verified on, how many trained numbers the layers cover of how many), what
follows under *Changes*, and ``seal``: the SHA-256 of all bytes of the file before its value, which with ``"``, ``}`` and
two line ends is its last 68 bytes.

**Journal**, only ever added to: one JSON object a line, in any order while a store is being built, in that of the rows when
it is done. A line that does not end is not there yet.

===========  ==============================================================================================
key          content
===========  ==============================================================================================
``kind``     ``shard``; a reader refuses others
``segment``  0
``file``     name of the shard
``first``    its first row
``rows``     how many
``bytes``    length of the file
``sha256``   of the file
``blocks``   XXH3 (64 bits, hexadecimal) of its table of checksums
``settings`` which store it belongs to: SHA-256 of the manifest's content (keys sorted, as ``json.dumps`` writes it)
             without ``facts`` and what *Changes* adds, ``requires`` empty
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
with ``out``                    F32         ``(rows, c * (out + dim / out))``: c vectors of ``out`` numbers, then c of
                                            ``dim / out``; the gradient is the sum of their outer products
``@scale/LAYER``                F32         ``(rows,)`` int8 and float16, powers of two there: gradient = scale * number;
                                            absent in float16 shards of version 0.1, where it is 1
with ``block_scales``           I8 U8       ``LAYER`` holds codes: of 8 bits ``(rows, numbers)``; of 4 ``(rows, ceil(numbers
                                            / 2))``, each plus 8, the first of two in the lower half of a byte, 8 behind
                                            the last. ``@scale/LAYER`` is BF16 ``(rows, ceil(numbers / 32))``, one for
                                            every 32 numbers of a row: number = scale * code
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

**Changes.** A store that was never changed has none of this. Else the manifest has also

===============  ============================================================================================
key              content
===============  ============================================================================================
``segments``     the parts of the store in the order of their rows, each ``folder``, ``rows`` and ``settings`` as
                 its journal has it. Folder ``""`` is the store's own, described by this manifest; others are
                 ``segment-00001``, ... (appended) and ``compacted-00002``, ..., each a store with a manifest,
                 journal, shards and ids of its own, whose ``first`` count from 0
``next``         the number of the next folder; one is never used twice
``tombstones``   only where rows are deleted: ``file``, ``rows`` (how many are deleted), ``bytes`` and ``blocks``
===============  ============================================================================================

The file of tombstones, ``deleted-00001.bin``, ..., is one bit a row of all parts together, 1 where it is deleted, the lowest
bit of each byte first; rows behind its last byte are not. A table of checksums, as of a shard, ends it. A reader leaves
deleted rows out: they count neither in ``rows`` that it reports nor in the order of rows. Names of rows that have none are
their numbers within their part.

*Appending* writes ``segment-N`` as any store is built, then the manifest that names it. *Deleting* writes a file of
tombstones, then the manifest that names it; gradients and names stay on disk until the store is compacted. *Compacting*
copies the rows that are left, bit by bit, into ``compacted-N``, replaces the manifest by that store's with ``segments``
naming it alone, and then removes the files of before: what is known of single rows in ``facts`` goes too. What no manifest
names was left by a process that was killed, and is removed by the next change; ``segment-N`` and ``compacted-N`` of the
next number stay to be finished.

A reader that checks what it reads, in plain NumPy::

    import hashlib, json, pathlib
    import numpy as np


    def read_manifest(folder):
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        assert hashlib.sha256(raw[:-68]).hexdigest() == manifest["seal"]
        assert set(manifest["requires"]) <= {"block_scales", "factors", "segments", "tombstones"}
        return manifest


    def read_store(folder, layer):
        folder = pathlib.Path(folder)
        manifest = read_manifest(folder)
        parts = []
        for segment in manifest.get("segments", [{"folder": ""}]):
            inner = folder / segment["folder"]
            parts.append(read_part(inner, manifest if inner == folder else read_manifest(inner), layer))
        rows = np.concatenate(parts)
        if (deleted := manifest.get("tombstones")) is not None:
            raw = np.fromfile(folder / deleted["file"], np.uint8)
            bits = np.unpackbits(raw[: -8 * -(-len(raw) // 16392)], bitorder="little")[: len(rows)]
            assert len(raw) == deleted["bytes"] and bits.sum() == deleted["rows"]
            rows = rows[np.flatnonzero(np.pad(bits, (0, len(rows) - len(bits))) == 0)]
        return rows


    def read_part(folder, manifest, layer):
        parts, before = {}, None
        for line in (folder / "journal").read_bytes().splitlines():
            shard = json.loads(line)
            assert hashlib.sha256(line[:-66]).hexdigest() == shard["seal"] and shard["kind"] == "shard"
            assert before in (None, shard["before"])
            before = shard["seal"]
            raw = np.memmap(folder / shard["file"], dtype=np.uint8, mode="r")
            assert len(raw) == shard["bytes"] and hashlib.sha256(raw).hexdigest() == shard["sha256"]
            size = int(raw[:8].view("<u8")[0])
            header = json.loads(bytes(raw[8 : 8 + size]))

            def tensor(entry):
                begin, end = entry["data_offsets"]
                dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}[entry["dtype"]]
                found = raw[8 + size + begin : 8 + size + end].view(dtype).reshape(entry["shape"])
                return found if entry["dtype"] != "BF16" else (found.astype("<u4") << 16).view("<f4")

            rows, scale = tensor(header[layer]), header.get("@scale/" + layer)
            dim, out = (manifest["layers"][layer].get(key) for key in ("dim", "out"))
            if (blocks := manifest.get("block_scales")) is not None:
                numbers = dim if out is None else manifest["factors"] * (out + dim // out)
                if blocks["bits"] == 4:
                    rows = np.stack([rows & 15, rows >> 4], 2).reshape(len(rows), -1)[:, :numbers].astype("i1") - 8
                rows = rows * np.repeat(tensor(scale), blocks["numbers"], 1)[:, :numbers]
            elif scale is not None:
                rows = rows * tensor(scale)[:, None]
            if out is not None:
                left, right = np.split(rows, [manifest["factors"] * out], axis=1)
                left, right = (side.reshape(len(rows), manifest["factors"], -1) for side in (left, right))
                rows = (left.transpose(0, 2, 1) @ right).reshape(len(rows), -1)
            parts[shard["first"]] = rows
        rows = np.concatenate([parts[first] for first in sorted(parts)])
        assert len(rows) == manifest["rows"]
        return rows
"""

from __future__ import annotations

FORMAT, VERSION = "influence_fast.gradients", 2
MANIFEST, JOURNAL = "manifest.json", "journal"
