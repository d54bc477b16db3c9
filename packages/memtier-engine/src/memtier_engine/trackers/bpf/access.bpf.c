// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * Reads page tables of a process for user space: present, accessed and dirty bits of every page.
 *
 * One source for two loaders. With clang -target bpf it becomes a CO-RE object (libbpf fits the structure offsets to
 * the running kernel). bcc compiles it with MEMTIER_BCC defined and OFFSET_<struct>_<field> taken from the running
 * kernel's BTF, so the layout in the kernel headers that bcc includes does not matter.
 *
 * `locate` and `walk` are never attached: user space runs them with BPF_PROG_RUN (Linux 5.10), in its own context,
 * which costs other processes nothing. Their arguments come as the context of a raw tracepoint.
 */
/*
 * Clang 19 otherwise joins the two ends of a loop to one that it compares for equality, and the verifier then follows
 * every number of rounds on its own: beyond its limit of a million instructions.
 */
#define OPAQUE(value) asm volatile("" : "+r"(value))

#ifdef MEMTIER_BCC

#define PROGRAM(kind)
#define MAP_ARRAY(name, value_type, entries) BPF_F_TABLE("array", u32, value_type, name, entries, 1 << 10)
#define MAP_HASH(name, key_type, value_type) BPF_F_TABLE("hash", key_type, value_type, name, ENTRIES_##name, 0)
#define MAP_LRU(name, key_type, value_type) BPF_F_TABLE("lru_hash", key_type, value_type, name, ENTRIES_##name, 0)
#define AT(type, pointer, field) ((u64)(pointer) + OFFSET_##type##_##field)
#define SUBPROGRAM static __always_inline
#define RAW_ARGS struct bpf_raw_tracepoint_args

#else

typedef unsigned char u8;
typedef unsigned int u32;
typedef int s32;
typedef unsigned long long u64;
typedef long long s64;

#define PROGRAM(kind) __attribute__((section(kind), used))
#define MAP_ARRAY(name, value_type, entries)                                                                           \
	struct {                                                                                                       \
		int(*type)[2]; /* BPF_MAP_TYPE_ARRAY */                                                                \
		int(*max_entries)[entries];                                                                            \
		int(*map_flags)[1 << 10]; /* BPF_F_MMAPABLE */                                                         \
		u32 *key;                                                                                              \
		value_type *value;                                                                                     \
	} name __attribute__((section(".maps"), used))
/* One entry: who loads a program sets the size of the maps it needs. */
#define MAP_OF_TYPE(name, number, key_type, value_type)                                                                \
	struct {                                                                                                       \
		int(*type)[number];                                                                                    \
		int(*max_entries)[1];                                                                                  \
		key_type *key;                                                                                         \
		value_type *value;                                                                                     \
	} name __attribute__((section(".maps"), used))
#define MAP_HASH(name, key_type, value_type) MAP_OF_TYPE(name, 1, key_type, value_type)
#define MAP_LRU(name, key_type, value_type) MAP_OF_TYPE(name, 9, key_type, value_type)
#define AT(type, pointer, field) ((u64)__builtin_preserve_access_index(&((struct type *)(pointer))->field))
#define SUBPROGRAM __attribute__((noinline))
#define RAW_ARGS struct raw_args

/* Source: include/uapi/linux/bpf.h, ___BPF_FUNC_MAPPER. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static u64 (*bpf_get_current_task)(void) = (void *)35;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;

struct raw_args {
	u64 args[0];
};

/* Only the fields used; libbpf finds their real places by name. */
#define KERNEL __attribute__((preserve_access_index))
struct atomic {
	s32 counter;
} KERNEL;
struct mm_struct {
	void *pgd;
	struct atomic mm_users;
	void *notifier_subscriptions;
} KERNEL;
struct file {
	void *private_data;
} KERNEL;
struct fdtable {
	u32 max_fds;
	struct file **fd;
} KERNEL;
struct files_struct {
	struct fdtable *fdt;
} KERNEL;
struct task_struct {
	struct mm_struct *mm;
	struct files_struct *files;
} KERNEL;

char LICENSE[] __attribute__((section("license"), used)) = "GPL";

#endif

#define BLOCKS 160 /* 2 MiB blocks a run: 256 MiB need up to 129 of them */
#define CANDIDATES 256
#define GIB_SHIFT 30

#define PRESENT 0x001ULL
#define HUGE 0x080ULL
#define PROT_NONE 0x100ULL
#define ADDRESS_BITS 0x000ffffffffff000ULL

/* What became of a block; `paging.py` has the same numbers. */
#define STATE_NOTHING 0
#define STATE_TABLE 1
#define STATE_HUGE_PMD 2
#define STATE_HUGE_PUD 3
#define STATE_UNSTABLE 4
#define STATE_GONE 5

#define OTHER_MMU 256 /* added to the state of the first block */

#define HEAD_ONLY 1ULL /* in `address`: do not copy the page table */

struct block {
	u64 address; /* asked for: 2 MiB aligned, plus HEAD_ONLY */
	u64 entry;   /* of the level that STATE names */
	u64 state;
};
struct table {
	u64 words[512];
};

MAP_ARRAY(blocks, struct block, BLOCKS);
MAP_ARRAY(tables, struct table, BLOCKS);

/* bcc rewrites map.lookup(), but not within macros. */
static __attribute__((always_inline)) inline struct block *block_at(u32 key)
{
#ifdef MEMTIER_BCC
	return blocks.lookup(&key);
#else
	return bpf_map_lookup_elem(&blocks, &key);
#endif
}

static __attribute__((always_inline)) inline struct table *table_at(u32 key)
{
#ifdef MEMTIER_BCC
	return tables.lookup(&key);
#else
	return bpf_map_lookup_elem(&tables, &key);
#endif
}

struct paging {
	u64 base; /* of the direct map of physical memory */
	u64 mask; /* physical address bits of an entry, without the encryption bit */
	u64 top_shift; /* address bits below an entry of the top level: 39, or 48 with five levels */
	u64 pgd;
};

static __attribute__((always_inline)) inline u64 kernel_u64(u64 from)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)from);
	return value;
}

/* The mm_struct behind an open /proc/PID/pagemap of the calling process (pagemap_open() puts it there), or 0. */
static __attribute__((always_inline)) inline u64 mm_of_pagemap(u64 fd)
{
	u64 files, fdt, array, file;
	u32 max_fds = 0;

	files = kernel_u64(AT(task_struct, bpf_get_current_task(), files));
	if (!files)
		return 0;
	fdt = kernel_u64(AT(files_struct, files, fdt));
	if (!fdt)
		return 0;
	bpf_probe_read_kernel(&max_fds, sizeof(max_fds), (void *)AT(fdtable, fdt, max_fds));
	if (fd >= max_fds)
		return 0;
	array = kernel_u64(AT(fdtable, fdt, fd));
	file = kernel_u64(array + fd * 8);
	if (!file)
		return 0;
	return kernel_u64(AT(file, file, private_data));
}

/*
 * Whether another MMU (KVM, a GPU, RDMA on demand) reads this memory through page tables of its own: its accesses leave
 * no trace in ours. Kernels without CONFIG_MMU_NOTIFIER have neither the field nor such devices.
 */
static __attribute__((always_inline)) inline u64 has_other_mmu(u64 mm)
{
#ifdef MEMTIER_BCC
#ifdef OFFSET_mm_struct_notifier_subscriptions
	return kernel_u64(AT(mm_struct, mm, notifier_subscriptions)) != 0;
#else
	return 0;
#endif
#else
	if (!__builtin_preserve_field_info(((struct mm_struct *)0)->notifier_subscriptions, 2)) /* exists? */
		return 0;
	return kernel_u64(AT(mm_struct, mm, notifier_subscriptions)) != 0;
#endif
}

/* The entry that maps `address`, at PMD level or at the PUD level if that maps 1 GiB. Sets `state`. */
static __attribute__((always_inline)) inline u64 entry_of(struct paging *paging, u64 address, u64 *state)
{
	u64 entry, table = paging->pgd;

	*state = STATE_NOTHING;
	if (paging->top_shift == 48) {
		entry = kernel_u64(table + ((address >> 48) & 511) * 8);
		if (!(entry & PRESENT))
			return 0;
		table = paging->base + (entry & paging->mask);
	}
	entry = kernel_u64(table + ((address >> 39) & 511) * 8);
	if (!(entry & PRESENT))
		return 0;
	table = paging->base + (entry & paging->mask);
	entry = kernel_u64(table + ((address >> 30) & 511) * 8);
	if (entry & HUGE) {
		*state = STATE_HUGE_PUD;
		return entry;
	}
	if (!(entry & PRESENT))
		return 0;
	table = paging->base + (entry & paging->mask);
	entry = kernel_u64(table + ((address >> 21) & 511) * 8);
	/* HUGE alone says that the page is there: while it is split or without access rights it is not PRESENT, and swap
	 * entries never have HUGE. Source: arch/x86/include/asm/pgtable.h, pmd_present(). */
	if (entry & HUGE)
		*state = STATE_HUGE_PMD;
	else if (entry & PRESENT)
		*state = STATE_TABLE;
	return entry;
}

/*
 * Block number `key`. libbpf keeps this a global function, which the verifier checks once and not for each of the
 * blocks (0.01 s instead of 0.3 s); so its arguments are numbers, five at most.
 */
SUBPROGRAM int read_block(u64 pgd, u64 base, u64 mask, u64 top_shift, u32 key)
{
	struct paging paging = {};
	struct block *block = block_at(key);
	struct table *table = table_at(key);
	u64 state = STATE_NOTHING, again = STATE_NOTHING, entry;

	if (!block || !table)
		return 0;
	paging.pgd = pgd;
	paging.base = base;
	paging.mask = mask;
	paging.top_shift = top_shift;
	entry = entry_of(&paging, block->address, &state);
	if (state == STATE_TABLE && !(block->address & HEAD_ONLY)) {
		if (bpf_probe_read_kernel(table, sizeof(*table), (void *)(base + (entry & mask))))
			state = STATE_UNSTABLE;
		/* A table that was unlinked meanwhile may hold another's data by now. Accessed and dirty bits of
		 * the entry itself may have changed: only the address counts. */
		else if ((entry_of(&paging, block->address, &again) ^ entry) & ADDRESS_BITS || again != state)
			state = STATE_UNSTABLE;
	}
	block->entry = entry;
	block->state = state;
	return 1;
}

/*
 * args: pagemap fd, number of blocks, direct map base, physical address mask, shift of the top level.
 * In: blocks[].address. Out: blocks[].entry and .state, tables[]; OTHER_MMU in blocks[0].state.
 */
PROGRAM("raw_tp/memtier_walk")
int walk(RAW_ARGS *context)
{
	u64 count = context->args[1], base = context->args[2], mask = context->args[3], top_shift = context->args[4];
	u64 mm, pgd = 0;
	s32 users = 0;
	u32 i;

	mm = mm_of_pagemap(context->args[0]);
	if (mm)
		bpf_probe_read_kernel(&users, sizeof(users), (void *)AT(mm_struct, mm, mm_users));
	/* Without users the process has exited, and its tables are gone. User space has set every state to GONE. */
	if (users > 0)
		pgd = kernel_u64(AT(mm_struct, mm, pgd));
	if (!pgd)
		return 0;
	for (i = 0; i < BLOCKS; i++) {
		OPAQUE(count);
		if (i >= count)
			break;
		read_block(pgd, base, mask, top_shift, i);
	}
	if (has_other_mmu(mm)) {
		struct block *first = block_at(0);

		if (first)
			first->state |= OTHER_MMU;
	}
	return 0;
}

/*
 * args: pagemap fd of the caller, number of the first candidate, physical address of 16 bytes, and these bytes.
 * The direct map begins at a multiple of 1 GiB (arch/x86/mm/kaslr.c) and holds our page directory: candidates are the
 * multiples of 1 GiB at and below that. Out: blocks[0]: address = page directory, entry = the base that shows the
 * bytes at that place, state = 1 if there is one.
 */
PROGRAM("raw_tp/memtier_locate")
int locate(RAW_ARGS *context)
{
	u64 first = context->args[1], physical = context->args[2], low = context->args[3], high = context->args[4];
	u64 mm, pgd, base;
	struct block *answer;
	u32 i;

	answer = block_at(0);
	if (!answer)
		return 0;
	answer->address = 0;
	answer->entry = 0;
	answer->state = 0;
	mm = mm_of_pagemap(context->args[0]);
	if (!mm)
		return 0;
	pgd = kernel_u64(AT(mm_struct, mm, pgd));
	answer->address = pgd;
	for (i = 0; i < CANDIDATES; i++) {
		base = ((pgd >> GIB_SHIFT) - first - i) << GIB_SHIFT;
		if (kernel_u64(base + physical) == low && kernel_u64(base + physical + 8) == high) {
			answer->entry = base;
			answer->state = 1;
			break;
		}
	}
	return 0;
}

/*
 * From here on: programs that are attached, for the sources `faults` and `hardware`. They count for the processes in
 * `watched` only.
 */

#define REGION_SHIFT 21
#define PAGE_SHIFT_4K 12
#define SWAP_TYPE_SHIFT 59 /* arch/x86/include/asm/pgtable_64.h, __swp_type() */
#define SWAP_TYPES 23	   /* the least MAX_SWAPFILES can be: types from there on are migration, markers, ... */
#define FAULT_PRESENT 1ULL /* arch/x86/include/asm/trap_pf.h */
#define FAULT_WRITE 2ULL
#define NO_ERROR_CODE (~0ULL)

struct place {
	u64 number; /* of the 2 MiB region, or of the page */
	u64 tgid;
};
struct fault_counts {
	u64 reads;
	u64 writes;
	u64 faults; /* all, also where reads and writes cannot be told apart */
	u64 not_present;
	u64 swap_ins;
	u64 major; /* swap-ins that waited for the device */
	u64 major_ns;
};
struct swap_in {
	u64 began_ns;
	u64 region;
};
struct lost_counts {
	u64 faults;
	u64 touches;
};

MAP_ARRAY(settings, struct paging, 1);
MAP_ARRAY(lost, struct lost_counts, 1);
MAP_HASH(watched, u32, u32);
MAP_HASH(faults, struct place, struct fault_counts);
MAP_LRU(pending, u32, struct swap_in);
MAP_HASH(touches, struct place, u64);

static __attribute__((always_inline)) inline struct paging *settings_at(u32 key)
{
#ifdef MEMTIER_BCC
	return settings.lookup(&key);
#else
	return bpf_map_lookup_elem(&settings, &key);
#endif
}

static __attribute__((always_inline)) inline struct lost_counts *lost_at(u32 key)
{
#ifdef MEMTIER_BCC
	return lost.lookup(&key);
#else
	return bpf_map_lookup_elem(&lost, &key);
#endif
}

static __attribute__((always_inline)) inline u32 *watched_at(u32 key)
{
#ifdef MEMTIER_BCC
	return watched.lookup(&key);
#else
	return bpf_map_lookup_elem(&watched, &key);
#endif
}

static __attribute__((always_inline)) inline struct fault_counts *counts_of(struct place *place)
{
	struct fault_counts zero = {}, *counts;

#ifdef MEMTIER_BCC
	counts = faults.lookup(place);
	if (!counts) {
		faults.insert(place, &zero);
		counts = faults.lookup(place);
	}
#else
	counts = bpf_map_lookup_elem(&faults, place);
	if (!counts) {
		bpf_map_update_elem(&faults, place, &zero, 1); /* BPF_NOEXIST */
		counts = bpf_map_lookup_elem(&faults, place);
	}
#endif
	return counts;
}

static __attribute__((always_inline)) inline u64 *touches_of(struct place *place)
{
	u64 zero = 0, *count;

#ifdef MEMTIER_BCC
	count = touches.lookup(place);
	if (!count) {
		touches.insert(place, &zero);
		count = touches.lookup(place);
	}
#else
	count = bpf_map_lookup_elem(&touches, place);
	if (!count) {
		bpf_map_update_elem(&touches, place, &zero, 1);
		count = bpf_map_lookup_elem(&touches, place);
	}
#endif
	return count;
}

static __attribute__((always_inline)) inline struct swap_in *pending_of(u32 tid)
{
#ifdef MEMTIER_BCC
	return pending.lookup(&tid);
#else
	return bpf_map_lookup_elem(&pending, &tid);
#endif
}

static __attribute__((always_inline)) inline void pending_set(u32 tid, struct swap_in *swap_in)
{
#ifdef MEMTIER_BCC
	pending.update(&tid, swap_in);
#else
	bpf_map_update_elem(&pending, &tid, swap_in, 0);
#endif
}

static __attribute__((always_inline)) inline void pending_drop(u32 tid)
{
#ifdef MEMTIER_BCC
	pending.delete(&tid);
#else
	bpf_map_delete_elem(&pending, &tid);
#endif
}

/* The page table entry of the current process at `address`; 0 where there is none. A huge page gives its entry. */
static __attribute__((always_inline)) inline u64 own_entry(u64 address)
{
	struct paging *known = settings_at(0), paging = {};
	u64 mm, entry, state;

	if (!known || !known->base)
		return 0;
	mm = kernel_u64(AT(task_struct, bpf_get_current_task(), mm));
	if (!mm)
		return 0;
	paging.base = known->base;
	paging.mask = known->mask;
	paging.top_shift = known->top_shift;
	paging.pgd = kernel_u64(AT(mm_struct, mm, pgd));
	entry = entry_of(&paging, address, &state);
	if (state != STATE_TABLE)
		return entry;
	return kernel_u64(paging.base + (entry & paging.mask) + ((address >> PAGE_SHIFT_4K) & 511) * 8);
}

static __attribute__((always_inline)) inline int count_fault(u64 address, u64 error_code)
{
	u64 identity = bpf_get_current_pid_tgid(), entry;
	struct fault_counts *counts;
	struct lost_counts *missed;
	struct place place = {};

	place.tgid = identity >> 32;
	if (!watched_at(place.tgid))
		return 0;
	place.number = address >> REGION_SHIFT;
	counts = counts_of(&place);
	if (!counts) {
		missed = lost_at(0);
		if (missed)
			__sync_fetch_and_add(&missed->faults, 1);
		return 0;
	}
	__sync_fetch_and_add(&counts->faults, 1);
	if (error_code != NO_ERROR_CODE) {
		if (error_code & FAULT_WRITE)
			__sync_fetch_and_add(&counts->writes, 1);
		else
			__sync_fetch_and_add(&counts->reads, 1);
		if (error_code & FAULT_PRESENT)
			return 0;
	}
	entry = own_entry(address);
	if (error_code != NO_ERROR_CODE || !(entry & PRESENT))
		__sync_fetch_and_add(&counts->not_present, 1);
	/* As in paging.py: neither PRESENT nor PROT_NONE, and not empty: in swap, or a special entry. */
	if (entry && !(entry & (PRESENT | PROT_NONE)) && entry >> SWAP_TYPE_SHIFT < SWAP_TYPES) {
		struct swap_in swap_in = {};

		__sync_fetch_and_add(&counts->swap_ins, 1);
		swap_in.began_ns = bpf_ktime_get_ns();
		swap_in.region = place.number;
		pending_set((u32)identity, &swap_in);
	} else if (pending_of((u32)identity)) {
		pending_drop((u32)identity); /* that one found its page in the swap cache */
	}
	return 0;
}

/* args: address, registers, error code. Source: arch/x86/include/asm/trace/exceptions.h. */
PROGRAM("raw_tp/page_fault_user")
int on_fault(RAW_ARGS *context)
{
	return count_fault(context->args[0], context->args[2]);
}

/* struct bpf_perf_event_data of x86_64. */
struct perf_data {
	u64 registers[21];
	u64 sample_period;
	u64 addr;
};

/* PERF_COUNT_SW_PAGE_FAULTS, where there is no tracepoint: comes as the fault begins. */
PROGRAM("perf_event")
int on_perf_fault(struct perf_data *context)
{
	return count_fault(context->addr, NO_ERROR_CODE);
}

/* PERF_COUNT_SW_PAGE_FAULTS_MAJ: comes as the fault ends. Source: mm/memory.c, mm_account_fault(). */
PROGRAM("perf_event")
int on_major_fault(struct perf_data *context)
{
	u64 identity = bpf_get_current_pid_tgid();
	struct fault_counts *counts;
	struct swap_in *swap_in;
	struct place place = {};

	place.tgid = identity >> 32;
	swap_in = pending_of((u32)identity);
	if (!swap_in)
		return 0;
	place.number = swap_in->region;
	if (context->addr >> REGION_SHIFT == place.number) {
		counts = counts_of(&place);
		if (counts) {
			__sync_fetch_and_add(&counts->major, 1);
			__sync_fetch_and_add(&counts->major_ns, bpf_ktime_get_ns() - swap_in->began_ns);
		}
	}
	pending_drop((u32)identity);
	return 0;
}

/* A sample of a PMU event with a data address. */
PROGRAM("perf_event")
int on_sample(struct perf_data *context)
{
	struct lost_counts *missed;
	struct place place = {};
	u64 *count;

	place.tgid = bpf_get_current_pid_tgid() >> 32;
	if (!context->addr || context->addr >> 63 || !watched_at(place.tgid))
		return 0;
	place.number = context->addr >> PAGE_SHIFT_4K;
	count = touches_of(&place);
	if (count) {
		__sync_fetch_and_add(count, 1);
		return 0;
	}
	missed = lost_at(0);
	if (missed)
		__sync_fetch_and_add(&missed->touches, 1);
	return 0;
}
