"""Certificates and kubeconfigs, by kubeadm's own phases, so that nothing of it is invented here."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from tuneserve_cluster.errors import run
from tuneserve_cluster.packages import program
from tuneserve_cluster.settings import Cluster, write_if_changed

ADMIN = "super-admin.conf"  # works without any role binding, unlike admin.conf
DAYS = "3650"


def kubeadm_config(cluster: Cluster, version: str) -> str:
    plan = cluster.plan
    return f"""apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
clusterName: {cluster.name}
kubernetesVersion: {version}
certificatesDir: {cluster.pki}
controlPlaneEndpoint: {plan.node_ip}:6443
networking: {{serviceSubnet: {plan.services}, podSubnet: {plan.pods}, dnsDomain: cluster.local}}
apiServer: {{certSANs: [127.0.0.1, localhost, {plan.node_ip}, {cluster.node_name}]}}
encryptionAlgorithm: ECDSA-P256
certificateValidityPeriod: 87600h
caCertificateValidityPeriod: 87600h
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {plan.node_ip}, bindPort: 6443}}
nodeRegistration: {{name: {cluster.node_name}, criSocket: "unix://{cluster.containerd_socket}"}}
"""


def create(cluster: Cluster, version: str) -> None:
    """Makes what is missing; a second call changes nothing."""
    config = cluster.conf / "kubeadm.yaml"
    write_if_changed(config, kubeadm_config(cluster, version))
    kubeadm = cluster.bin / "kubeadm"
    if not (cluster.conf / "scheduler.conf").exists():  # the last that kubeadm writes
        run([kubeadm, "init", "phase", "certs", "all", "--config", config], "kubeadm cannot make certificates")
        run(
            [kubeadm, "init", "phase", "kubeconfig", "all", "--config", config, "--kubeconfig-dir", cluster.conf],
            "kubeadm cannot make kubeconfigs",
        )
    _kubelet_serving_certificate(cluster)
    if not cluster.kubeconfig.exists():
        text = (cluster.conf / ADMIN).read_text()
        for key, name in (("client-certificate-data", "admin.crt"), ("client-key-data", "admin.key")):
            found = re.search(rf"{key}: (\S+)", text)
            assert found is not None, f"kubeadm's {ADMIN} has no {key}"
            _private(cluster.pki / name, base64.b64decode(found.group(1)))
        _private(cluster.kubeconfig, text.encode())


def _private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _kubelet_serving_certificate(cluster: Cluster) -> None:
    """Signed by the cluster's CA, so that the API server can verify the kubelet when it fetches logs."""
    certificate, key = cluster.pki / "kubelet.crt", cluster.pki / "kubelet.key"
    if certificate.exists():
        return
    openssl, request, extensions = program("openssl"), cluster.pki / "kubelet.csr", cluster.pki / "kubelet.ext"
    subject = f"/O=system:nodes/CN=system:node:{cluster.node_name}"
    extensions.write_text(
        f"subjectAltName=DNS:{cluster.node_name},IP:{cluster.plan.node_ip}\nextendedKeyUsage=serverAuth\n"
    )
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    failure = "openssl cannot make the kubelet's certificate"
    run([openssl, "req", *curve, "-nodes", "-keyout", key, "-subj", subject, "-out", request], failure)
    signer: list[str | Path] = ["-CA", cluster.pki / "ca.crt", "-CAkey", cluster.pki / "ca.key", "-CAcreateserial"]
    run(
        [openssl, "x509", "-req", "-in", request, *signer, "-days", DAYS, "-extfile", extensions, "-out", certificate],
        failure,
    )
