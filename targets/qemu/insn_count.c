/*
 * QEMU plugin: how often each block of the guest's code ran, from a function's entry to its return.
 *
 *   qemu-aarch64 -plugin libinsn_count.so,out=FILE[,start=ADDRESS[,stop=ADDRESS][,marks=FILE]] program
 *
 * Counting starts whenever the instruction at `start` (the function's entry) is reached and ends when control is back
 * behind the call, or at `stop` where that is given (needed when a linker's veneer stands between caller and function).
 * Without `start` everything is counted. FILE receives a line per translation block that ran, all decimal:
 *
 *   ADDRESS BYTES INSTRUCTIONS EXECUTIONS
 *
 * with `start` a line per reading in the order of time. One begins with each call, its ID is -1, and one with each mark
 * that is reached and has another ID than the mark before; the instruction at the mark belongs to it. The file of marks
 * has lines `ADDRESS ID`.
 *
 *   reading CALL ID INSTRUCTIONS
 *
 * and a last line `end CALLS ACTIVE STOP`: how often counting started, 1 if it was still on when the program ended, and
 * where it stopped; whoever reads that may check that a call stands in front of it. A block is entered at its first
 * instruction and left after its last, so sums of INSTRUCTIONS * EXECUTIONS are exact; instructions of a Thumb IT block
 * count whether or not their condition holds. One guest thread. The same in user and system emulation.
 *
 * The interface is QEMU's stable plugin API (docs/devel/tcg-plugins), declared here because Debian has no header for
 * it. Only functions that every version since QEMU 6.0 has: the inline counters of 7.2 went with version 2 of the API.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info_t qemu_info_t;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*exec_cb)(unsigned int, void *);
typedef void (*exit_cb)(qemu_plugin_id_t, void *);

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, exec_cb, enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, exec_cb, enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, exit_cb, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = PLUGIN_VERSION;
EXPORT int qemu_plugin_install(qemu_plugin_id_t, const qemu_info_t *, int, char **);

/* A block of guest code. QEMU may translate the same address again, at another length too. */
struct block {
    uint64_t address, bytes, instructions, executions;
    struct block *next;
};

struct mark {
    uint64_t address;
    long id;
};

struct reading {
    uint64_t call, instructions;
    long id;
};

/* An instruction at a mark; rest: how many instructions its block has from there on. */
struct place {
    long id;
    uint64_t rest;
};

#define BUCKETS 65536u
static struct block *table[BUCKETS];
static const char *path;
static uint64_t start, stop, calls, behind;
static int gated, stop_given, active;
static struct mark *marks;
static struct reading *readings;
static size_t mark_count, reading_count, reading_room;

static void *resize(void *memory, size_t bytes) {
    void *made = realloc(memory, bytes);
    if (!made) {
        fprintf(stderr, "insn_count: no memory\n");
        exit(5);
    }
    return made;
}

static struct block *find(uint64_t address, uint64_t bytes, uint64_t instructions) {
    struct block **bucket = &table[(address >> 1) % BUCKETS];
    for (struct block *b = *bucket; b; b = b->next) {
        if (b->address == address && b->bytes == bytes && b->instructions == instructions) return b;
    }
    struct block *made = (struct block *)resize(NULL, sizeof *made);
    made->executions = 0;
    made->address = address;
    made->bytes = bytes;
    made->instructions = instructions;
    made->next = *bucket;
    *bucket = made;
    return made;
}

static void begin_reading(long id) {
    if (reading_count == reading_room) {
        reading_room = 2 * reading_room + 64;
        readings = (struct reading *)resize(readings, reading_room * sizeof *readings);
    }
    readings[reading_count].call = calls;
    readings[reading_count].id = id;
    readings[reading_count++].instructions = 0;
}

static void ran(unsigned int cpu, void *data) {
    (void)cpu;
    struct block *b = (struct block *)data;
    if (gated) {
        if (active && b->address == stop) {
            active = 0;
        } else if (!active && b->address == start) {
            active = 1;
            calls++;
            begin_reading(-1);
            /* The block before ended with the call: execution goes on behind it. */
            if (!stop_given) stop = behind;
        }
        behind = b->address + b->bytes;
        if (!active) return;
        readings[reading_count - 1].instructions += b->instructions;
    }
    b->executions++;
}

/* Called after `ran` for the block, which gave all of it to the reading before. */
static void reached(unsigned int cpu, void *data) {
    const struct place *at = (const struct place *)data;
    (void)cpu;
    /* Behind a mark a loop may begin: its rounds are one reading. */
    if (!active || readings[reading_count - 1].id == at->id) return;
    readings[reading_count - 1].instructions -= at->rest;
    begin_reading(at->id);
    readings[reading_count - 1].instructions = at->rest;
}

static void mark_block(struct qemu_plugin_tb *tb, size_t n) {
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        for (size_t m = 0; m < mark_count; m++) {
            if (marks[m].address != qemu_plugin_insn_vaddr(insn)) continue;
            struct place *at = (struct place *)resize(NULL, sizeof *at);
            at->id = marks[m].id;
            at->rest = n - i;
            qemu_plugin_register_vcpu_insn_exec_cb(insn, reached, QEMU_PLUGIN_CB_NO_REGS, at);
        }
    }
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    const size_t n = qemu_plugin_tb_n_insns(tb);
    const uint64_t address = qemu_plugin_tb_vaddr(tb);
    const struct qemu_plugin_insn *last = qemu_plugin_tb_get_insn(tb, n - 1);
    const uint64_t bytes = qemu_plugin_insn_vaddr(last) + qemu_plugin_insn_size(last) - address;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, ran, QEMU_PLUGIN_CB_NO_REGS, find(address, bytes, n));
    mark_block(tb, n);
}

static int read_marks(const char *name) {
    FILE *file = fopen(name, "r");
    struct mark m;
    if (!file) return 1;
    while (fscanf(file, "%" SCNu64 " %ld", &m.address, &m.id) == 2) {
        marks = (struct mark *)resize(marks, (mark_count + 1) * sizeof *marks);
        marks[mark_count++] = m;
    }
    fclose(file);
    return 0;
}

static void finish(qemu_plugin_id_t id, void *data) {
    (void)id;
    (void)data;
    FILE *file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "insn_count: cannot write %s\n", path);
        return;
    }
    for (size_t i = 0; i < BUCKETS; i++) {
        for (const struct block *b = table[i]; b; b = b->next) {
            if (!b->executions) continue;
            fprintf(file, "%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", b->address, b->bytes, b->instructions,
                    b->executions);
        }
    }
    for (size_t i = 0; i < reading_count; i++) {
        const struct reading *r = &readings[i];
        fprintf(file, "reading %" PRIu64 " %ld %" PRIu64 "\n", r->call, r->id, r->instructions);
    }
    fprintf(file, "end %" PRIu64 " %d %" PRIu64 "\n", calls, active, stop);
    if (fclose(file)) fprintf(stderr, "insn_count: cannot write %s\n", path);
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            path = strdup(argv[i] + 4);
        } else if (!strncmp(argv[i], "start=", 6)) {
            start = strtoull(argv[i] + 6, NULL, 0);
            gated = 1;
        } else if (!strncmp(argv[i], "stop=", 5)) {
            stop = strtoull(argv[i] + 5, NULL, 0);
            stop_given = 1;
        } else if (!strncmp(argv[i], "marks=", 6)) {
            if (read_marks(argv[i] + 6)) {
                fprintf(stderr, "insn_count: cannot read %s\n", argv[i] + 6);
                return 1;
            }
        } else {
            fprintf(stderr, "insn_count: unknown option %s\n", argv[i]);
            return 1;
        }
    }
    if (!path || ((stop_given || mark_count) && !gated)) {
        fprintf(stderr, "insn_count: usage: out=FILE[,start=ADDRESS[,stop=ADDRESS][,marks=FILE]]\n");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finish, NULL);
    return 0;
}
