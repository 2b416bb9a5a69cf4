"""Content credentials: untouched, altered, re-encoded and forged files are told apart, with other people's keys too."""

import base64
import hashlib
import io
import json
import shutil
import stat
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image

from avatars import painted_avatar, talking
from geodiff4d.cli import main
from geodiff4d.core.errors import UserError
from geodiff4d.core.files import SIGNED, fresh_folder
from geodiff4d.core.images import read_image, write_image
from geodiff4d.core.video import read_video, write_video
from geodiff4d.heads import load_head
from geodiff4d.provenance import seal
from geodiff4d.provenance.beside import NAME, place_of
from geodiff4d.provenance.credentials import local_credentials, local_path, read_credentials, self_made
from geodiff4d.provenance.seal import Sealer, origin, verify
from geodiff4d.provenance.statement import Statement, hash_portraits
from geodiff4d.provenance.verdict import State

SAID = Statement(("ab" * 32,), "a model", "permitted")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Somebody's own credentials: (certificate, key, the issuer's certificate) as files, and what signs with them."""
    folder = tmp_path_factory.mktemp("mine")
    made = self_made("someone")
    certificate, key, issuer = folder / "cert.pem", folder / "key.pem", folder / "issuer.pem"
    certificate.write_bytes(made.chain)
    key.write_bytes(made.key)
    mark = b"-----BEGIN CERTIFICATE-----"
    issuer.write_bytes(mark + made.chain.split(mark)[2])
    return certificate, key, issuer, Sealer(made)


@pytest.fixture(params=["image.png", "image.jpg", "video.mp4", "page.html", "folder"])
def made(request, tmp_path):
    """One file of each kind, or a folder."""
    path = tmp_path / request.param
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    if path.suffix == ".mp4":
        write_video(path, image.expand(3, -1, -1, -1))
    elif path.suffix == ".html":
        path.write_text("<p>hello</p>")
    elif path.suffix:
        write_image(path, image)
    else:
        with fresh_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "config.json").write_text("{}")
            (folder / "sub" / "params.bin").write_bytes(bytes(100))
            write_image(folder / "preview.png", image)
    return path


def flip(path):
    """Change one byte in the middle of what a file shows."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"IDAT") + 20 if path.suffix == ".png" else data.rfind(b"mdat") + 60
    data[at if path.suffix in (".png", ".mp4") else len(data) - 5] ^= 1
    path.write_bytes(data)


def test_untouched_and_altered(made, mine):
    *_, issuer, sealer = mine
    sealer.seal(made, SAID)
    (verdict,) = verify([made])
    assert verdict.state is State.UNTOUCHED and not verdict.trusted and "someone" in verdict.signer
    assert verdict.statement == replace(SAID, made=verdict.statement.made) and verdict.statement.made
    assert verify([made], issuer)[0].trusted
    flip(made if made.is_file() else made / "sub" / "params.bin")
    (verdict,) = verify([made], issuer)
    assert verdict.state is State.ALTERED and verdict.why


def test_what_is_signed_still_opens(tmp_path, mine):
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "a.png", image)
    write_video(tmp_path / "a.mp4", image.expand(5, -1, -1, -1))
    before = read_image(tmp_path / "a.png"), torch.stack(list(read_video(tmp_path / "a.mp4")))
    for name in ("a.png", "a.mp4"):
        mine[-1].seal(tmp_path / name, SAID)
    assert torch.equal(read_image(tmp_path / "a.png"), before[0])
    assert torch.equal(torch.stack(list(read_video(tmp_path / "a.mp4"))), before[1])


def test_cropping_and_encoding_again_lose_it(tmp_path, mine):
    path = tmp_path / "a.png"
    write_image(path, torch.rand(3, 32, 48))
    mine[-1].seal(path, SAID)
    Image.open(path).crop((4, 4, 20, 20)).save(tmp_path / "cropped.png")
    Image.open(path).save(tmp_path / "again.jpg")
    assert {v.state for v in verify([tmp_path / "cropped.png", tmp_path / "again.jpg"])} == {State.UNSIGNED}


def test_a_manifest_moved_to_another_image_is_found_out(tmp_path, mine):
    """The chunk that holds a real image's manifest is put into a forged one."""
    path = tmp_path / "a.png"
    write_image(path, torch.rand(3, 32, 48))
    mine[-1].seal(path, SAID)
    data, at = path.read_bytes(), path.read_bytes().index(b"caBX") - 4
    chunk = data[at : at + 12 + struct.unpack(">I", data[at : at + 4])[0]]
    other = io.BytesIO()
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(other, "PNG")
    # Behind the header's chunk of 33 bytes, as c2pa puts it.
    (tmp_path / "forged.png").write_bytes(other.getvalue()[:33] + chunk + other.getvalue()[33:])
    (verdict,) = verify([tmp_path / "forged.png"])
    assert verdict.state is State.ALTERED and "Hash" in verdict.why


def test_a_statement_that_was_rewritten_is_found_out(tmp_path, mine):
    page, other = tmp_path / "me.html", self_made("someone")
    page.write_text("hello")
    mine[-1].seal(page, SAID)
    document = json.loads(place_of(page).read_text())
    document["claim"]["consent"] = "self"
    place_of(page).write_text(json.dumps(document))
    assert verify([page])[0].state is State.ALTERED
    # Signed anew, by somebody who calls himself the same: whole, and trusted by nobody who trusts the first.
    Sealer(other).seal(page, replace(SAID, consent="self"))
    (verdict,) = verify([page], mine[2])
    assert verdict.state is State.UNTOUCHED and "someone" in verdict.signer and not verdict.trusted


def test_a_signer_cannot_vouch_for_others(tmp_path, mine):
    """Only issuers may: else whoever owns one certificate could make any number of names."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    owner = load_pem_private_key(mine[1].read_bytes(), None)
    (leaf, *above), key = x509.load_pem_x509_certificates(mine[0].read_bytes()), ec.generate_private_key(ec.SECP256R1())
    today = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "a bank")])
    builder = x509.CertificateBuilder(
        leaf.subject, name, key.public_key(), 1, today - timedelta(1), today + timedelta(1)
    )
    chain = [builder.sign(owner, hashes.SHA256()), leaf, *above]
    pem = b"".join(c.public_bytes(Encoding.PEM) for c in chain)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "page.html").write_text("hello")
    Sealer(replace(mine[-1].credentials, chain=pem, key=secret)).seal(tmp_path / "page.html", SAID)
    (verdict,) = verify([tmp_path / "page.html"], mine[2])
    assert verdict.state is State.UNTOUCHED and verdict.signer == "a bank" and not verdict.trusted


@pytest.mark.parametrize("text", ["", "{", "[]", '{"claim": {"files": []}}', '{"format": 1}', "null", "[" * 9000])
def test_damaged_statements_are_no_crash(tmp_path, text):
    (tmp_path / "page.html").write_text("hello")
    (tmp_path / f"page.html.{NAME}").write_text(text)
    assert verify([tmp_path / "page.html"])[0].state is State.ALTERED


def test_a_key_of_an_unknown_kind_is_damage(tmp_path, mine):
    (tmp_path / "a.html").write_text("a page")
    mine[-1].seal(tmp_path / "a.html", SAID)
    place = place_of(tmp_path / "a.html")
    said = json.loads(place.read_text())
    first, rest = said["certificates"].split("-----END CERTIFICATE-----", 1)
    der = base64.b64decode(first.replace("-----BEGIN CERTIFICATE-----", ""))
    kind = bytes.fromhex("06072a8648ce3d0201")
    assert kind in der, "an elliptic curve's key"
    other = base64.encodebytes(der.replace(kind, kind[:-1] + b"\x7f")).decode()
    said["certificates"] = f"-----BEGIN CERTIFICATE-----\n{other}-----END CERTIFICATE-----{rest}"
    place.write_text(json.dumps(said))
    (verdict,) = verify([tmp_path / "a.html"])
    assert verdict.state is State.ALTERED and "damaged" in verdict.why


def test_files_of_a_folder_and_names_outside_of_it(tmp_path, mine):
    with fresh_folder(tmp_path / "clip") as folder:
        (folder / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
    mine[-1].seal(tmp_path / "clip", SAID)
    assert verify([tmp_path / "clip" / "a.txt"])[0].state is State.UNTOUCHED
    (tmp_path / "clip" / "b.txt").unlink()
    (verdict,) = verify([tmp_path / "clip"])
    assert verdict.state is State.ALTERED and "b.txt" in verdict.why
    assert origin(tmp_path / "clip") == Statement()
    (tmp_path / "clip" / "new.txt").write_text("new")
    assert verify([tmp_path / "clip" / "new.txt"])[0].state is State.UNSIGNED
    (tmp_path / "clip" / "b.txt").write_text("b")
    (verdict,) = verify([tmp_path / "clip"])
    assert verdict.state is State.UNTOUCHED and any("added: new.txt" in line for line in verdict.lines())


def test_a_tracked_portrait_tells_the_hash_of_its_file(tmp_path):
    (tmp_path / "me.jpg").write_bytes(b"a portrait")
    (tmp_path / "me").mkdir()
    about = {"geodiff4d": {"extra": {"source_sha256": list(hash_portraits([tmp_path / "me.jpg"]))}}}
    (tmp_path / "me" / "transforms.json").write_text(json.dumps(about))
    assert hash_portraits([tmp_path / "me"]) == (hashlib.sha256(b"a portrait").hexdigest(),)
    (tmp_path / "me" / "transforms.json").write_text("{}")
    assert hash_portraits([tmp_path / "me"]) == ()


def test_a_signed_folder_is_replaced_as_any_of_ours(tmp_path, mine):
    for _ in range(2):
        with fresh_folder(tmp_path / "avatar") as folder:
            (folder / "a.txt").write_text("a")
        mine[-1].seal(tmp_path / "avatar", SAID)
    assert NAME == SIGNED
    assert verify([tmp_path / "avatar"])[0].state is State.UNTOUCHED


def test_the_local_certificate_is_made_once_and_is_the_owner_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    first = local_credentials()
    assert stat.S_IMODE(local_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(local_path().parent.stat().st_mode) == 0o700
    assert local_credentials() == first
    local_path().write_bytes(first.key + first.chain[:300])
    with pytest.raises(UserError, match="damaged"):
        local_credentials()


def test_credentials_that_do_not_belong_together(tmp_path, mine):
    certificate, key, *_ = mine
    (tmp_path / "other.pem").write_bytes(self_made().key)
    assert read_credentials(certificate, key).algorithm == "es256"
    for given, message in (
        ((certificate, tmp_path / "other.pem"), "is not the key of"),
        ((key, key), "no certificate"),
        ((certificate, certificate), "no private key"),
        ((tmp_path / "none.pem", key), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_credentials(*given)


def test_from_an_avatar_to_its_exports(tmp_path, mine, monkeypatch, capsys):
    """What is said of an avatar is said of what is made of it, by commands, with one's own credentials and without."""
    head = load_head()
    painted_avatar(head, talking(head, 2)).save(tmp_path / "avatar")
    mine[-1].seal(tmp_path / "avatar", SAID)
    own = ["--credentials", str(mine[0]), str(mine[1])]
    for name in ("me.html", "me.ply"):
        assert main(["export", str(tmp_path / "avatar"), str(tmp_path / name), *own]) == 0
    render = ["render", str(tmp_path / "avatar"), "--frames", "2", "--size", "32", "--camera", "front", "--out"]
    assert main([*render, str(tmp_path / "me.mp4")]) == 0
    made = [tmp_path / name for name in ("me.html", "me.ply", "me.mp4")]
    verdicts = verify(made, mine[2])
    assert [v.state for v in verdicts] == [State.UNTOUCHED] * 3
    assert [v.trusted for v in verdicts] == [True, True, False]
    assert {(v.statement.portrait_sha256, v.statement.consent) for v in verdicts} == {(("ab" * 32,), "permitted")}
    capsys.readouterr()
    assert main(["verify", *map(str, made)]) == 0
    assert capsys.readouterr().out.count("untouched since it was signed") == 3
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, made), "--trust", str(mine[2])])
    assert stop.value.code == 1
    assert main(["verify", str(tmp_path / "none.png")]) == 2
    # Without the extra, everything is written as before.
    monkeypatch.setattr(seal, "PACKAGES", ("no_such_package",))
    shutil.rmtree(tmp_path / "avatar")
    painted_avatar(head, talking(head, 2)).save(tmp_path / "avatar")
    assert main([*render, str(tmp_path / "plain.mp4")]) == 0
    assert main([*render, str(tmp_path / "plain.mp4"), *own]) == 2
    assert main(["verify", str(tmp_path / "plain.mp4")]) == 2
    assert "provenance" in capsys.readouterr().err
    monkeypatch.undo()
    assert verify([tmp_path / "plain.mp4"])[0].state is State.UNSIGNED
