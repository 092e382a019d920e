"""Is the sample beside a stream's shards what this version would store of it?"""

import hashlib

from chimera.convert.encode.chats import ChatRenderer
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.proof_lines import stored
from chimera.convert.encode.template import Renderer
from chimera.convert.encode.texts import Reject
from chimera.convert.stream_settings import StreamSettings
from chimera.convert.verify.root import Root, VerifyError
from chimera.manifest import Manifest
from chimera.proof_file import name_of, unpack
from chimera.text import one_line


def proof_problems(root: Root, name: str, manifest: Manifest, raw: bytes) -> list[str]:
    """What is wrong with the proof of a stream; `raw` is the build's tokenizer.json. Encodes by `tokenizers` alone."""
    stream, file = manifest.streams[name], name_of(name)
    try:
        packed = root.read(file)
    except VerifyError as error:
        return [str(error)]
    if hashlib.sha256(packed).hexdigest() != stream.proof:
        return [f"{file}: its SHA-256 is not the manifest's"]
    try:
        return _differences(file, packed, name, manifest, raw)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of another program
        return [f"{file}: not readable as a proof: {one_line(repr(error))[:200]}"]


def _differences(file: str, packed: bytes, name: str, manifest: Manifest, raw: bytes) -> list[str]:
    stream, tokenizer = manifest.streams[name], manifest.tokenizer
    control = stream.template.control if stream.template else ()
    encoder = Encoder(raw, tokenizer.eos_token, tokenizer.pad_token, file, True, control, "tokenizers")
    encoder.leave_fast_path("for the proof")
    encoder.bos = tuple(tokenizer.bos)
    chats = None
    if stream.template:
        renderer = Renderer(stream.template)
        chats = ChatRenderer(renderer, encoder.control_tokens(), tokenizer.eos_token, tokenizer.pad_token)
    shaping = manifest.settings["streams"][name]
    if shaping.get("template") == "file":  # its text is the manifest's, and its path is not needed
        shaping = shaping | {"template": "tokenizer"}
    reader = DocumentReader(StreamSettings.model_validate(shaping), encoder.special_ids, "", chats)
    for number, line in enumerate(unpack(packed), 1):
        try:
            now = stored(line, reader, encoder)
        except Reject as reject:
            return [f"{file}:{number}: is {reject} now"]
        if differs := [key for key, value in now.items() if value != line[key]]:
            return [f"{file}:{number}: other {' and '.join(differs)} would be stored now"]
    return []
