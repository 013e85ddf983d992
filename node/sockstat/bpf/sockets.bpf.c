// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Counters of the node's TCP sockets.
//
//   tag_opened   sockops on the node's cgroup: tags its listeners, and what they
//                accept, as they come to be. Runs once per connection.
//   tag_existing iter/tcp: tags those that were there before. Runs once, at
//                attach; kernels before 5.12 refuse it.
//   sockets      iter/bpf_sk_storage_map: writes one record per tagged socket,
//                then one footer. It keeps no state, so that any number of
//                readers may read it.
#include "kernel.h"

#define PORTS 8

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct tag {
	u64 cookie; /* iterators of 5.10 cannot ask for it */
};

struct {
	int (*type)[BPF_MAP_TYPE_SK_STORAGE];
	int (*map_flags)[BPF_F_NO_PREALLOC];
	int *key;
	struct tag *value;
} tags SEC(".maps");

struct record {
	u64 cookie;
	u64 received;
	u32 local[4]; /* IPv4 as ::ffff:a.b.c.d; network order */
	u32 peer[4];
	u16 local_port;
	u16 peer_port; /* network order */
	u32 netns;
	u32 queue; /* bytes; of a listener: connections */
	u32 limit; /* of a listener */
	u32 window;
	u32 srtt_us; /* in eighths */
	u32 retransmits;
	u32 drops;
	u32 state;
	u32 zero;
};
const struct record *unused_record __attribute__((unused));

/* Who loaded this, and for what. */
struct footer {
	u64 magic;
	u64 loaded_ns;    /* Unix time */
	u16 ports[PORTS]; /* local ones, of the sockets to tag */
	u8 version[40];
	u8 cgroup[128];
};
const volatile struct footer load = {};

static inline int wanted(u32 port)
{
#pragma unroll
	for (int i = 0; i < PORTS; i++)
		if (load.ports[i] && load.ports[i] == port)
			return 1;
	return 0;
}

SEC("sockops") int tag_opened(struct bpf_sock_ops *ctx)
{
	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (!wanted(ctx->local_port))
		return 1;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return 1;
	struct tag *t = bpf_sk_storage_get(&tags, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (t)
		t->cookie = bpf_get_socket_cookie(ctx);
	return 1;
}

SEC("iter/tcp") int tag_existing(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	if (!skc || !wanted(skc->skc_num))
		return 0;
	u8 state = skc->skc_state;
	if (state != TCP_LISTEN && state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT)
		return 0;
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	struct tag *t = bpf_sk_storage_get(&tags, tp, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (t)
		t->cookie = bpf_get_socket_cookie(tp);
	return 0;
}

static inline void addresses(struct record *r, struct sock_common *skc)
{
	r->local_port = skc->skc_num;
	r->peer_port = skc->skc_dport;
	if (skc->skc_family == AF_INET6 && __builtin_preserve_field_info(skc->skc_v6_daddr, BPF_FIELD_EXISTS)) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			r->local[i] = skc->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			r->peer[i] = skc->skc_v6_daddr.in6_u.u6_addr32[i];
		}
		return;
	}
	r->local[2] = r->peer[2] = 0xffff0000; /* little-endian */
	r->local[3] = skc->skc_rcv_saddr;
	r->peer[3] = skc->skc_daddr;
}

SEC("iter/bpf_sk_storage_map") int sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct tag *t = ctx->value;
	if (!sk || !t) {
		bpf_seq_write(ctx->meta->seq, (const void *)&load, sizeof load);
		return 0;
	}
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	struct record r = { .cookie = t->cookie, .state = sk->__sk_common.skc_state };
	switch (r.state) {
	case TCP_LISTEN:
		r.queue = sk->sk_ack_backlog;
		r.limit = sk->sk_max_ack_backlog;
		break;
	case TCP_ESTABLISHED:
	case TCP_CLOSE_WAIT: {
		/* Nothing is locked: a segment that arrives meanwhile must not
		 * look like bytes that were read. */
		u32 next = tp->rcv_nxt;
		r.received = tp->bytes_received;
		if (tp->rcv_nxt != next) {
			next = tp->rcv_nxt;
			r.received = tp->bytes_received;
		}
		r.queue = next - tp->copied_seq;
		r.window = tp->rcv_wnd;
		r.srtt_us = tp->srtt_us;
		r.retransmits = tp->total_retrans;
		break;
	}
	default:
		return 0;
	}
	r.drops = sk->sk_drops.counter;
	r.netns = sk->__sk_common.skc_net.net->ns.inum;
	addresses(&r, &sk->__sk_common);
	bpf_seq_write(ctx->meta->seq, &r, sizeof r);
	return 0;
}
