"""Every command of docs/guides does what the page shows, in a home with nothing in it. (The README: test_sessions.)"""

import os
import re
import socket
import subprocess
from pathlib import Path

import guides
import pytest
from mounting import reason_against_mounts
from pc import initramfs, sshd
from pc.kernels import CLOUD, GENERIC, needs_debian, needs_kernels

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
README = ROOT / "README.md"
BOOTS = {"linux": (CLOUD, initramfs.build), "server": (GENERIC, sshd.initrd)}  # what their readers have
NEEDS = {"linux": needs_kernels, "server": (needs_kernels, needs_debian)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    yield home
    for mount in home.iterdir():
        if os.path.ismount(mount):
            subprocess.run(["fusermount3", "-uz", mount], check=False)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=NEEDS.get(page.stem, ())) for page in GUIDES],
)
def test_what_a_page_shows_is_what_comes(page, home):
    if reason := reason_against_mounts():
        pytest.skip(reason)
    if page.stem in BOOTS:
        kernel, make_initrd = BOOTS[page.stem]
        (home / "vmlinuz").symlink_to(kernel.image)
        (home / "initrd.img").write_bytes(make_initrd())
    guides.run(page, home, {"~/src/vmfs": str(ROOT), "2222": str(free_port())})
    assert not [one for one in home.iterdir() if os.path.ismount(one)], "the page leaves no mount"


def test_the_readme_names_every_guide():
    text = README.read_text()
    assert {path.name for path in GUIDES} == set(re.findall(r"\(docs/guides/([\w-]+\.md)\)", text))


def test_links_lead_somewhere():
    for page in (README, *GUIDES):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_where_they_are_run():
    for page in (README, *GUIDES):
        for block in guides.blocks(page.read_text()):
            if block.language != "console":
                assert not re.search(r"^\$ ", block.body, re.MULTILINE), f"{page.name}: {block.body}"


def test_the_runner_finds_what_is_not_so(tmp_path):
    page = tmp_path / "page.md"
    for number, (shown, good) in enumerate(
        (("1", True), ("2", False), ("", False), ("...", True), ("1\n2", False), ("1...", True), ("x...", False))
    ):
        page.write_text(f"```console\n$ echo 1\n{shown}\n```\n" if shown else "```console\n$ echo 1\n```\n")
        (tmp_path / f"home{number}").mkdir()
        if good:
            guides.run(page, tmp_path / f"home{number}")
        else:
            with pytest.raises(AssertionError, match=r"page\.md: \$ echo 1"):
                guides.run(page, tmp_path / f"home{number}")
