"""The distribution's packages: found by the programs they bring, installed by apt where it exists."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from tuneserve_cluster.errors import ClusterError, run

SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
CNI_PLUGINS = Path("/usr/lib/cni")
PT_INTERP = 3

# package -> a program of it. containerd and etcd are not among them: Debian's are too old for this Kubernetes.
NEEDED = {
    "runc": "runc",
    "containernetworking-plugins": str(CNI_PLUGINS / "ptp"),
    "iptables": "iptables",
    "nftables": "nft",
    "conntrack": "conntrack",
    "ipset": "ipset",
    "ebtables": "ebtables",
    "ethtool": "ethtool",
    "socat": "socat",
    "iproute2": "ip",
    "mount": "mount",
    "util-linux": "nsenter",
    "busybox-static": "busybox",
    "openssl": "openssl",
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    # For the product's images, which are built on this machine where no image registry can be reached.
    "debootstrap": "debootstrap",
    "buildah": "buildah",
}


def program(name: str) -> Path:
    """Where a program lies, /usr/sbin included whatever PATH says."""
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise ClusterError(f"the program {name} is missing; run `cluster build`, which installs it")
    return Path(found)


def is_static(binary: Path) -> bool:
    """Debian's plain `busybox` needs a loader that an image made of it alone does not have.

    Such a program has an ELF program header of the type PT_INTERP.
    """
    content = binary.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        return False
    table, size, count = *struct.unpack_from("<Q", content, 32), *struct.unpack_from("<HH", content, 54)
    return all(struct.unpack_from("<I", content, table + entry * size)[0] != PT_INTERP for entry in range(count))


def missing() -> list[str]:
    """The packages whose programs are not there."""
    absent = [package for package, name in NEEDED.items() if shutil.which(name, path=SEARCH_PATH) is None]
    absent = [package for package in absent if not Path(NEEDED[package]).is_file()]
    if "busybox-static" not in absent and not is_static(program("busybox")):
        absent.append("busybox-static")
    return absent


def install_missing() -> None:
    """Installs what is absent; a machine without apt is told what to install."""
    absent = missing()
    if not absent:
        return
    if shutil.which("apt-get") is None:
        programs = ", ".join(NEEDED[package] for package in absent)
        raise ClusterError(f"these programs are missing and there is no apt-get to install them: {programs}")
    print(f"installing Debian packages: {' '.join(absent)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["nice", "apt-get", "install", "-y", "--no-install-recommends", *absent]
    try:
        run(install, "apt-get install failed", env=environment)
    except ClusterError:
        # The package lists may be absent (fresh containers) or too old.
        run(["nice", "apt-get", "update"], "apt-get update failed", env=environment)
        run(install, f"apt cannot install {' '.join(absent)}", env=environment)
