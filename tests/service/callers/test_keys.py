"""API keys: what a file may hold, how keys are found, exchanged and made; nothing of a key gets into an error."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.callers import key_file, keys
from service.callers.keys import ANYBODY, KeyFileError, KeyRing, Quota, load_keys, parse_keys, without_keys_on_loopback
from service.settings import LaunchSettings, Settings, SettingsError
from tests.service.running_server import REPOSITORY, free_port, run_command

SECRET = "vlsae-swordfish"


def entry(secret: str = SECRET, **changes) -> dict:
    """A key as a file holds it."""
    return {"name": "alice", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": ["chat"], **changes}


def ring(*entries: dict) -> KeyRing:
    return KeyRing(parse_keys(json.dumps({"keys": entries}).encode(), source="test"))


def write(file: Path, *entries: dict) -> None:
    file.write_text(json.dumps({"keys": entries}))


def found(key_ring: KeyRing, secret: str) -> str | None:
    caller = key_ring.find(secret.encode())
    return caller and caller.name


def test_a_key_is_found_by_all_of_it() -> None:
    caller = ring(entry("other", name="bob"), entry(quota={"images_per_minute": 3})).find(SECRET.encode())
    assert caller is not None
    assert (caller.name, caller.scopes, caller.quota) == ("alice", {"chat"}, Quota(images_per_minute=3))
    for wrong in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), entry()["sha256"]):
        assert ring(entry()).find(wrong.encode()) is None, wrong
    assert ring().find(SECRET.encode()) is None


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_key_is_compared_whichever_it_is(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = [], hmac.compare_digest

    def counted(presented: str, known: str) -> bool:
        compared.append(known)
        return compare(presented, known)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    entries = [entry(f"secret {index}") for index in range(3)]
    assert found(ring(*entries), f"secret {place}") == "alice"
    assert compared == [one["sha256"] for one in entries]


@pytest.mark.parametrize(
    ("expires", "valid"),
    [("2000-01-01T00:00:00Z", False), ("2000-01-01T00:00:00+02:00", False), ("9999-01-01T00:00:00Z", True)],
)
def test_expired_keys_are_no_keys(expires: str, valid: bool) -> None:
    assert (found(ring(entry(expires=expires)), SECRET) == "alice") is valid


def test_two_keys_of_one_name_are_one_caller() -> None:
    both = ring(entry("old"), entry("new"))
    assert found(both, "old") == found(both, "new") == "alice"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "keys.0.name: String should match"),
        ({"name": "a b"}, "keys.0.name: String should match"),
        ({"sha256": SECRET}, "keys.0.sha256: String should match"),
        ({"sha256": "A" * 64}, "keys.0.sha256: String should match"),
        ({"scopes": []}, "keys.0.scopes: .*at least 1"),
        ({"scopes": ["admin"]}, "keys.0.scopes.0: Input should be 'chat', 'explain', 'evaluate' or 'metrics'"),
        ({"quota": {"images_per_minute": 0}}, "keys.0.quota.images_per_minute: .*greater than or equal to 1"),
        ({"quota": {"images_per_minute": "5"}}, "keys.0.quota.images_per_minute: .*valid integer"),
        ({"expires": "2030-01-01T00:00:00"}, "keys.0.expires: .*timezone"),
        ({SECRET: 1}, "as a whole: Extra inputs are not permitted"),
        ({"name": None}, "keys.0.name: .*valid string"),
    ],
)
def test_a_wrong_file_is_refused_without_quoting_it(changes: dict, says: str) -> None:
    with pytest.raises(KeyFileError, match=f"^test: {says}") as caught:
        ring(entry(**changes))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": 1}', '{"keys": [], "more": 1}', '"' + SECRET])
def test_broken_json_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse_keys(text.encode(), source="test")
    assert SECRET not in str(caught.value)


def test_one_secret_is_one_key() -> None:
    with pytest.raises(KeyFileError, match="two keys have the same hash"):
        ring(entry(), entry(name="bob"))


def test_keys_are_exchanged_while_the_service_runs(tmp_path: Path, later, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    write(file, entry("old"))
    key_ring = KeyRing.of_file(file)
    write(file, entry("new", name="alice-2"))
    assert found(key_ring, "old") == "alice", "the file is not looked at more than once a second"
    later()
    assert (found(key_ring, "old"), found(key_ring, "new")) == (None, "alice-2")
    monkeypatch.setattr(keys, "read_keys", lambda file: pytest.fail("read though it has not changed"))
    later()
    assert found(key_ring, "new") == "alice-2"


@pytest.mark.parametrize("broken", ['{"keys": [' + SECRET, None, '{"keys": [{"name": "' + SECRET + '"}]}'])
def test_a_broken_new_file_leaves_the_old_keys_and_is_logged_once(
    broken: str | None, tmp_path: Path, later, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    write(file, entry("old"))
    key_ring = KeyRing.of_file(file)
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    with caplog.at_level(logging.INFO, "service.callers.keys"):
        for _ in range(3):
            later()
            assert found(key_ring, "old") == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert SECRET not in caplog.text
    write(file, entry("new"))
    later()
    assert (found(key_ring, "old"), found(key_ring, "new")) == (None, "alice")


def test_a_file_that_could_not_be_read_once_is_read_later(
    tmp_path: Path, later, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    write(file, entry("old"))
    key_ring = KeyRing.of_file(file)
    write(file, entry("new"))

    def fail(_file: Path) -> None:
        raise KeyFileError("too many open files")

    with monkeypatch.context() as trouble:
        trouble.setattr(keys, "read_keys", fail)
        later()
        assert found(key_ring, "old") == "alice"
    later()
    assert (found(key_ring, "old"), found(key_ring, "new")) == (None, "alice")


def test_a_key_that_root_adds_leaves_the_file_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    write(file, entry("old"))
    owner = 12345 if os.geteuid() == 0 else os.geteuid()  # only root can give files away
    os.chown(file, owner, -1)
    assert keys.main(["--file", str(file), "--name", "new"]) == 0
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (owner, 0o600)


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    write(file, entry("in the file"))
    environment = {"VLSAE_KEYS": json.dumps({"keys": [entry("in the environment")]})}
    by_file, by_environment = load_keys(Settings(keys_file=str(file)), {}), load_keys(Settings(), environment)
    assert by_file is not None
    assert by_environment is not None
    assert found(by_file, "in the file") == found(by_environment, "in the environment") == "alice"
    with pytest.raises(SettingsError, match="use one of them"):
        load_keys(Settings(keys_file=str(file)), environment)


def test_no_keys_is_a_decision(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"python -m service.callers.keys.*--allow-anonymous on"):
        load_keys(Settings(), {"VLSAE_KEYS": ""})
    assert load_keys(Settings(allow_anonymous=True), {}) is None
    with pytest.raises(SettingsError, match=r"--keys-file: .*nowhere: cannot be read"):
        load_keys(Settings(keys_file=str(tmp_path / "nowhere"), allow_anonymous=True), {})
    (tmp_path / "large").write_bytes(b" " * (key_file.MAX_FILE_BYTES + 1))
    with pytest.raises(SettingsError, match=r"--keys-file: .*larger than"):
        load_keys(Settings(keys_file=str(tmp_path / "large")), {})


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example.org", False),
    ],
)  # fmt: skip
def test_only_loopback_needs_no_keys(host: str, allowed: bool) -> None:
    decided = without_keys_on_loopback(LaunchSettings(host=host), {})
    assert (decided.allow_anonymous, decided.only_local_names) == (allowed, allowed)
    assert not without_keys_on_loopback(LaunchSettings(host=host, keys_file="/k"), {}).allow_anonymous
    assert not without_keys_on_loopback(LaunchSettings(host=host), {"VLSAE_KEYS": "{}"}).allow_anonymous


def test_the_command_refuses_another_address_without_keys() -> None:
    command = run_command("--host", "0.0.0.0", "--port", str(free_port()))
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "without keys everybody who can reach the service" in refused.stderr


def make(file: Path, *arguments: str, name: str = "alice") -> int:
    """The exit status of `python -m service.callers.keys`."""
    return keys.main(["--file", str(file), "--name", name, *arguments])


def test_a_key_is_made_and_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    limits = ("--scopes", "chat,metrics", "--requests-per-minute", "5", "--expires", "9999-01-01T00:00:00Z")
    assert make(file, *limits) == 0
    secret = capsys.readouterr().out.strip()
    assert len(secret) >= 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in file.read_text()
    caller = KeyRing.of_file(file).find(secret.encode())
    assert caller is not None
    assert (caller.name, caller.scopes, caller.quota.requests_per_minute) == ("alice", {"chat", "metrics"}, 5)
    assert make(file, name="bob") == 0
    key_ring, second = KeyRing.of_file(file), capsys.readouterr().out.strip()
    assert (found(key_ring, secret), found(key_ring, second)) == ("alice", "bob")
    assert list(tmp_path.iterdir()) == [file], "nothing else is left behind"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--scopes", "chat,admin"), 2, "--scopes: Input should be 'chat'"),
        (("--images-per-minute", "0"), 2, "--images-per-minute: Input should be greater"),
        (("--expires", "tomorrow"), 2, "--expires: "),
        (("--name", "a b"), 2, "--name: String should match"),
    ],
)
def test_wrong_wishes_make_no_key(arguments, status: int, says: str, tmp_path: Path, capsys) -> None:
    assert make(tmp_path / "keys.json", *arguments) == status
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    file.write_text("{")
    assert make(file) == 1
    assert capsys.readouterr().out == ""
    assert file.read_text() == "{"
    assert make(tmp_path / "nowhere" / "keys.json") == 1


def test_of_several_who_add_keys_none_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def add(index: int) -> None:
        _secret, key = keys.new_key({"name": f"key-{index}", "scopes": ["chat"]})
        keys.append_key(file, key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert {key.name for key in keys.read_keys(file).keys} == {f"key-{index}" for index in range(24)}


def test_anybody_may_do_everything_and_has_no_name() -> None:
    assert (ANYBODY.name, ANYBODY.scopes) == ("", keys.SCOPES)
