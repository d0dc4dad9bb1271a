// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Verified load on a disk, all of it past the page cache:
//
//   load DISK FIRST-KIB KIB WRITERS SEED STOP-FILE
//
// The area is cut into blocks of 4 KiB, each with its number, a generation and noise that follows from both. Writers
// have a part of it each: they write some of their blocks, or read some and check that they find what the last write
// that was acknowledged has left there. One thread more, the keeper, only reads: from the first quarter of the area,
// which nobody writes any more, into pages that the CPUs never write. Before a page is read into again, and at the end,
// it must hold what the device has put there. So a page that only the device has written and that a migration has
// forgotten is found, and so is a request that a back end runs once more although the guest has its answer: it writes
// into a buffer, or to a block, that is in other use by then.
//
// Twice a second, and at the end, it prints a line {"event":"load",...}. It ends when STOP-FILE is there, with a check
// of everything, or at the first error, with a line {"event":"error",...} and status 1. Before it begins it reads the
// whole area: what an earlier run has left must be whole blocks in their places.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, MOST = 16, KEPT = 2048, MAX_WRITERS = 32 };

static const uint64_t MAGIC = 0x6f6c2d7568762d64;

static int disk;
static uint64_t first, blocks, fixed, seed;
static const char *stop_file;
// By block: what it holds; 0: never written by us.
static uint64_t *generations;
static _Atomic uint64_t writes, reads, flushes, kept, checked;
static atomic_bool stopping;

static void say(const char *format, ...) {
	char line[512];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	// In one piece: others print to the same port.
	if (length > 0 && write(1, line, (size_t)length) != length) _exit(2);
}

#define FAIL(format, ...)                                                                \
	do {                                                                             \
		say("VHU {\"event\":\"error\",\"reason\":\"load: " format "\"}\n", __VA_ARGS__); \
		_exit(1);                                                                \
	} while (0)

static uint64_t mix(uint64_t x) {
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static uint64_t next_random(uint64_t *state) {
	return mix(*state += 0x9e3779b97f4a7c15);
}

static void fill(uint64_t *words, uint64_t of_seed, uint64_t block, uint64_t generation) {
	uint64_t state = mix(of_seed ^ mix(block ^ mix(generation)));
	words[0] = MAGIC;
	words[1] = of_seed;
	words[2] = block;
	words[3] = generation;
	for (int i = 4; i < WORDS; i++) words[i] = state = state * 6364136223846793005 + 1442695040888963407;
}

// Whether a block is one of ours, as it was written.
static int whole(const uint64_t *words, uint64_t block) {
	uint64_t expected[WORDS];
	if (words[0] != MAGIC || words[2] != block) return 0;
	fill(expected, words[1], block, words[3]);
	return memcmp(words, expected, BLOCK) == 0;
}

static void check(const uint64_t *words, uint64_t block, uint64_t generation, const char *where) {
	uint64_t expected[WORDS];
	fill(expected, seed, block, generation);
	checked++;
	if (memcmp(words, expected, BLOCK) == 0) return;
	int at = 0;
	while (words[at] == expected[at]) at++;
	FAIL("%s: block %llu should hold generation %llu; it has, from word %d on, %016llx; its head says block %llu, "
	     "generation %llu, seed %llx of %llx",
	     where, (unsigned long long)block, (unsigned long long)generation, at, (unsigned long long)words[at],
	     (unsigned long long)words[2], (unsigned long long)words[3], (unsigned long long)words[1],
	     (unsigned long long)seed);
}

static void transfer(int out, void *buffer, uint64_t block, uint64_t count) {
	off_t offset = (off_t)(first + block * BLOCK);
	size_t size = count * BLOCK;
	ssize_t done = out ? pwrite(disk, buffer, size, offset) : pread(disk, buffer, size, offset);
	if (done != (ssize_t)size)
		FAIL("%s of %zu bytes at %lld: %s", out ? "write" : "read", size, (long long)offset,
		     done < 0 ? strerror(errno) : "too short");
}

static void *pages(size_t count) {
	void *memory = mmap(NULL, count * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED) FAIL("no memory for %zu pages", count);
	return memory;
}

static void *writer(void *argument) {
	uint64_t number = (uintptr_t)argument >> 32, of = (uint32_t)(uintptr_t)argument;
	uint64_t low = fixed + (blocks - fixed) * number / of, high = fixed + (blocks - fixed) * (number + 1) / of;
	uint64_t state = mix(seed + number);
	uint64_t(*buffer)[WORDS] = pages(MOST);
	while (!stopping) {
		uint64_t choice = next_random(&state);
		uint64_t block = low + (choice >> 8) % (high - low);
		uint64_t count = 1 + (choice >> 40) % MOST;
		if (choice & 1) count = 1;
		if (count > high - block) count = high - block;
		if (choice % 64 == 0) {
			if (fsync(disk) != 0) FAIL("flush: %s", strerror(errno));
			flushes++;
		} else if (choice % 8 < 5) {
			uint64_t generation = writes + 1;
			for (uint64_t i = 0; i < count; i++) fill(buffer[i], seed, block + i, generation);
			transfer(1, buffer, block, count);
			for (uint64_t i = 0; i < count; i++) generations[block + i] = generation;
			writes++;
		} else {
			memset(buffer, 0xee, count * BLOCK);
			transfer(0, buffer, block, count);
			for (uint64_t i = 0; i < count; i++)
				if (generations[block + i]) check(buffer[i], block + i, generations[block + i], "read");
			reads++;
		}
	}
	return NULL;
}

static void *keeper(void *unused) {
	(void)unused;
	uint64_t state = mix(~seed);
	uint64_t(*memory)[WORDS] = pages(KEPT);
	static uint64_t holds[KEPT];
	for (int i = 0; i < KEPT; i++) holds[i] = UINT64_MAX;
	while (!stopping) {
		uint64_t choice = next_random(&state);
		uint64_t count = 1 + choice % MOST, page = (choice >> 8) % KEPT, block = (choice >> 32) % fixed;
		if (count > KEPT - page) count = KEPT - page;
		if (count > fixed - block) count = fixed - block;
		for (uint64_t i = page; i < page + count; i++)
			if (holds[i] != UINT64_MAX) check(memory[i], holds[i], 1, "kept page");
		transfer(0, memory[page], block, count);
		for (uint64_t i = 0; i < count; i++) holds[page + i] = block + i;
		kept += count;
	}
	for (int i = 0; i < KEPT; i++)
		if (holds[i] != UINT64_MAX) check(memory[i], holds[i], 1, "kept page at the end");
	return NULL;
}

static void report(const char *event) {
	say("VHU {\"event\":\"%s\",\"writes\":%llu,\"reads\":%llu,\"flushes\":%llu,\"kept\":%llu,\"checked\":%llu}\n", event,
	    (unsigned long long)writes, (unsigned long long)reads, (unsigned long long)flushes, (unsigned long long)kept,
	    (unsigned long long)checked);
}

int main(int count, char **words) {
	if (count != 7) FAIL("%d arguments", count - 1);
	disk = open(words[1], O_RDWR | O_DIRECT);
	if (disk < 0) FAIL("%s: %s", words[1], strerror(errno));
	first = strtoull(words[2], NULL, 10) * 1024;
	blocks = strtoull(words[3], NULL, 10) * 1024 / BLOCK;
	uint64_t writers = strtoull(words[4], NULL, 10);
	seed = strtoull(words[5], NULL, 16);
	stop_file = words[6];
	fixed = blocks / 4;
	if (writers < 1 || writers > MAX_WRITERS || fixed < MOST || (blocks - fixed) / writers < MOST)
		FAIL("%llu writers on %llu blocks", (unsigned long long)writers, (unsigned long long)blocks);
	generations = calloc(blocks, sizeof *generations);
	uint64_t(*buffer)[WORDS] = pages(MOST);
	if (generations == NULL) FAIL("no memory for %llu blocks", (unsigned long long)blocks);

	uint64_t found = 0;
	for (uint64_t block = 0; block < blocks; block += MOST) {
		uint64_t run = blocks - block < MOST ? blocks - block : MOST;
		transfer(0, buffer, block, run);
		for (uint64_t i = 0; i < run; i++) {
			if (buffer[i][0] != MAGIC) continue;
			if (!whole(buffer[i], block + i))
				FAIL("block %llu of an earlier run is not whole", (unsigned long long)(block + i));
			found++;
		}
	}
	for (uint64_t block = 0; block < fixed; block += MOST) {
		uint64_t run = fixed - block < MOST ? fixed - block : MOST;
		for (uint64_t i = 0; i < run; i++) {
			fill(buffer[i], seed, block + i, 1);
			generations[block + i] = 1;
		}
		transfer(1, buffer, block, run);
	}
	say("VHU {\"event\":\"load-begins\",\"found\":%llu,\"blocks\":%llu}\n", (unsigned long long)found,
	    (unsigned long long)blocks);

	pthread_t threads[MAX_WRITERS + 1];
	for (uint64_t i = 0; i <= writers; i++) {
		void *argument = (void *)(uintptr_t)(i << 32 | writers);
		if (pthread_create(&threads[i], NULL, i < writers ? writer : keeper, argument) != 0) FAIL("no thread %d", (int)i);
	}
	while (access(stop_file, F_OK) != 0) {
		report("load");
		usleep(500000);
	}
	stopping = 1;
	for (uint64_t i = 0; i <= writers; i++) pthread_join(threads[i], NULL);
	for (uint64_t block = 0; block < blocks; block += MOST) {
		uint64_t run = blocks - block < MOST ? blocks - block : MOST;
		memset(buffer, 0xee, run * BLOCK);
		transfer(0, buffer, block, run);
		for (uint64_t i = 0; i < run; i++)
			if (generations[block + i]) check(buffer[i], block + i, generations[block + i], "at the end");
	}
	report("load-ended");
	return 0;
}
