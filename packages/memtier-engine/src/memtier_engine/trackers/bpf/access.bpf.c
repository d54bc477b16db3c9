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
#ifdef MEMTIER_BCC

#define PROGRAM(kind)
#define MAP_ARRAY(name, value_type, entries) BPF_F_TABLE("array", u32, value_type, name, entries, 1 << 10)
#define LOOKUP(map, key) map.lookup(key)
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
#define LOOKUP(map, key) bpf_map_lookup_elem(&map, key)
#define AT(type, pointer, field) ((u64)__builtin_preserve_access_index(&((struct type *)(pointer))->field))
#define SUBPROGRAM __attribute__((noinline))
#define RAW_ARGS struct raw_args

/* Source: include/uapi/linux/bpf.h, ___BPF_FUNC_MAPPER. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
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
	struct files_struct *files;
} KERNEL;

char LICENSE[] __attribute__((section("license"), used)) = "GPL";

#endif

#define BLOCKS 160 /* 2 MiB blocks a run: 256 MiB need up to 129 of them */
#define CANDIDATES 256
#define GIB_SHIFT 30

#define PRESENT 0x001ULL
#define HUGE 0x080ULL
#define ADDRESS_BITS 0x000ffffffffff000ULL

/* What became of a block; `paging.py` has the same numbers. */
#define STATE_NOTHING 0
#define STATE_TABLE 1
#define STATE_HUGE_PMD 2
#define STATE_HUGE_PUD 3
#define STATE_UNSTABLE 4
#define STATE_GONE 5

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
	struct block *block = LOOKUP(blocks, &key);
	struct table *table = LOOKUP(tables, &key);
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
 * In: blocks[].address. Out: blocks[].entry and .state, tables[].
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
		if (i >= count)
			break;
		read_block(pgd, base, mask, top_shift, i);
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
	u32 key = 0, i;

	answer = LOOKUP(blocks, &key);
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
