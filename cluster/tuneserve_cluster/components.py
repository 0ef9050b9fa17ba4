"""What runs in the node, each with the command line and configuration it needs.

The command lines are those that kubeadm would write, less what a throw-away
one-node cluster has no use for (leader election, profiling, synced disks).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster import configuration
from tuneserve_cluster.settings import BUSYBOX_IMAGE, Cluster

ETCD = "http://127.0.0.1:2379"
ETCD_PEERS = "http://127.0.0.1:2380"
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
NODE = ("containerd", "kubelet", "kube-proxy", "local-path-provisioner")


@dataclass(frozen=True)
class Component:
    """A program of the node, started by its name."""

    name: str
    arguments: tuple[str, ...]


def _flags(**values: object) -> Iterable[str]:
    return (f"--{name.replace('_', '-')}={value}" for name, value in values.items())


def etcd(cluster: Cluster) -> Component:
    return Component(
        "etcd",
        (
            *_flags(
                name=cluster.node_name,
                data_dir=cluster.state / "etcd",
                listen_client_urls=ETCD,
                advertise_client_urls=ETCD,
                listen_peer_urls=ETCD_PEERS,
                initial_advertise_peer_urls=ETCD_PEERS,
                initial_cluster=f"{cluster.node_name}={ETCD_PEERS}",
                auto_compaction_mode="periodic",
                auto_compaction_retention="10m",
                quota_backend_bytes=4 << 30,
                log_level="warn",
            ),
            "--unsafe-no-fsync",
        ),
    )


def apiserver(cluster: Cluster) -> Component:
    plan, pki = cluster.plan, cluster.pki
    return Component(
        "kube-apiserver",
        tuple(
            _flags(
                advertise_address=plan.node_ip,
                bind_address="0.0.0.0",
                secure_port=6443,
                etcd_servers=ETCD,
                service_cluster_ip_range=plan.services,
                service_account_issuer="https://kubernetes.default.svc.cluster.local",
                service_account_key_file=pki / "sa.pub",
                service_account_signing_key_file=pki / "sa.key",
                client_ca_file=pki / "ca.crt",
                tls_cert_file=pki / "apiserver.crt",
                tls_private_key_file=pki / "apiserver.key",
                kubelet_client_certificate=pki / "apiserver-kubelet-client.crt",
                kubelet_client_key=pki / "apiserver-kubelet-client.key",
                kubelet_certificate_authority=pki / "ca.crt",
                kubelet_preferred_address_types="InternalIP",
                requestheader_client_ca_file=pki / "front-proxy-ca.crt",
                requestheader_allowed_names="front-proxy-client",
                requestheader_username_headers="X-Remote-User",
                requestheader_group_headers="X-Remote-Group",
                requestheader_extra_headers_prefix="X-Remote-Extra-",
                proxy_client_cert_file=pki / "front-proxy-client.crt",
                proxy_client_key_file=pki / "front-proxy-client.key",
                authorization_mode="Node,RBAC",
                # The second is on in many managed clusters: an operator without the right to set
                # blockOwnerDeletion fails only there, unless it is on here too.
                enable_admission_plugins="NodeRestriction,OwnerReferencesPermissionEnforcement",
                allow_privileged="true",
                enable_aggregator_routing="true",
                profiling="false",
            )
        ),
    )


def controller_manager(cluster: Cluster) -> Component:
    pki, kubeconfig = cluster.pki, cluster.conf / "controller-manager.conf"
    return Component(
        "kube-controller-manager",
        (
            *_flags(
                kubeconfig=kubeconfig,
                authentication_kubeconfig=kubeconfig,
                authorization_kubeconfig=kubeconfig,
                bind_address="127.0.0.1",
                client_ca_file=pki / "ca.crt",
                cluster_name=cluster.name,
                cluster_signing_cert_file=pki / "ca.crt",
                cluster_signing_key_file=pki / "ca.key",
                root_ca_file=pki / "ca.crt",
                service_account_private_key_file=pki / "sa.key",
                requestheader_client_ca_file=pki / "front-proxy-ca.crt",
                use_service_account_credentials="true",
                leader_elect="false",
                allocate_node_cidrs="false",
                # Before any controller starts, each of 60 gets an account and a token: 4 s at the default of 20/s.
                kube_api_qps=300,
                kube_api_burst=600,
                profiling="false",
            ),
        ),
    )


def scheduler(cluster: Cluster) -> Component:
    kubeconfig = cluster.conf / "scheduler.conf"
    return Component(
        "kube-scheduler",
        tuple(
            _flags(
                kubeconfig=kubeconfig,
                authentication_kubeconfig=kubeconfig,
                authorization_kubeconfig=kubeconfig,
                bind_address="127.0.0.1",
                leader_elect="false",
                profiling="false",
            )
        ),
    )


def kwok(cluster: Cluster, stages: Path) -> Component:
    plan = cluster.plan
    return Component(
        "kwok",
        tuple(
            _flags(
                kubeconfig=cluster.kubeconfig,
                config=stages,
                manage_all_nodes="false",
                manage_nodes_with_annotation_selector="kwok.x-k8s.io/node=fake",
                node_ip=plan.node_ip,
                node_lease_duration_seconds=40,
                server_address="127.0.0.1:10247",
                cidr=plan.fake_pods,
            )
        ),
    )


def containerd(cluster: Cluster) -> Component:
    config = configuration.write_containerd(cluster)
    configuration.write_cni(cluster)
    return Component("containerd", ("--config", str(config), "--log-level", "warn"))


def kubelet(cluster: Cluster) -> Component:
    config = configuration.write_kubelet(cluster)
    return Component(
        "kubelet",
        tuple(
            _flags(
                config=config,
                kubeconfig=cluster.conf / "kubelet.conf",
                node_ip=cluster.plan.node_ip,
                hostname_override=cluster.node_name,
                v=1,
            )
        ),
    )


def kube_proxy(cluster: Cluster) -> Component:
    return Component("kube-proxy", tuple(_flags(config=configuration.write_kube_proxy(cluster))))


def local_path_provisioner(cluster: Cluster) -> Component:
    """A plain process: only its helper pods, which make and remove folders, need an image."""
    config, helper_pod = configuration.write_local_path(cluster)
    return Component(
        "local-path-provisioner",
        (
            "start",
            *_flags(
                kubeconfig=cluster.kubeconfig, config=config, helper_pod_file=helper_pod, helper_image=BUSYBOX_IMAGE
            ),
            *_flags(namespace="local-path-storage", service_account_name="local-path-provisioner"),
        ),
    )
