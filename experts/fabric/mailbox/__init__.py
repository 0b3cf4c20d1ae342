"""Fabric `mailbox`, its contract: rows and partial sums lie in shared regions, and flags say when they are there.

A step is the same sequence of operations at both ends, whether it is captured in a CUDA graph or started call by call:

    router, per MoE layer:  post(x, physical ids, weights) -> [experts of the router's own rank] -> take_sum
    shard,  per MoE layer:  take -> experts -> post(partial sums)

No host stands in between: kernels (or, on a CPU, the calling thread) wait for flags.

An *outbox* is a region of the router: its flag, then x [T, D] in the wire's dtype, ids [T, K] int32, weights [T, K]
float32. All shards of a host read the same one. An *inbox* is a region for one shard: its flag, then partial sums [T, D] in
the wire's dtype. Each flag is one 64-bit integer in a cache line of its own with one writer, and only rises. In a step the
flag of the MoE layer at position l is `first + l`; `first` is in the step's header, and nobody derives it.

One buffer each is enough: a router posts layer l + 1 only after it has taken all partial sums of layer l, each of which a
shard posts only after it has taken the rows of layer l.

A *stop word* is one 64-bit integer of a process that only rises, too. Every wait for a value at or below it returns, and
after a wait that returned so no post of its step raises a flag. So a step that nobody answers runs out on garbage within milliseconds, and its values
never count again. A *lane* is an outbox, the inboxes that answer it, and one end's operations on them.

T rows of a step, D hidden, K top-k, R shards that answer.
"""
