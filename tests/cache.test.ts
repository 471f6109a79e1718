/** The cache on local disk: what it keeps, what it lets go, and that it never serves anything else than was fetched. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  existsSync,
  fstatSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { Cache } from "../cache.ts";
import { CHUNK_BYTES } from "../cachechunk.ts";
import { type FakeOrigin, fakeOrigin, type ReaderSettings, readAll } from "./cachereader.ts";
import { killHard, mountSmall, randomBytes, seeded, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const isRoot = process.getuid?.() === 0;
if (!isRoot) console.log("skipped: the tests of a full or read-only disk mount a tmpfs, which needs root");

/** A cache in a folder of its own, and what it said. */
function openCache(options: { folder?: string; maxBytes?: number } = {}) {
  const temporary = options.folder === undefined ? temporaryFolder() : undefined;
  const folder = options.folder ?? join(temporary!.path, "cache");
  const said: string[] = [];
  const cache = Cache.open(folder, { maxBytes: options.maxBytes ?? 1024 * MIB, say: (problem) => said.push(problem) });
  return {
    cache,
    folder,
    said,
    async [Symbol.asyncDispose]() {
      await cache.close();
      temporary?.[Symbol.dispose]();
    },
  };
}

/** Reads the file as a session would, and returns what that took of the origin. */
async function read(cache: Cache, name: string, content: Uint8Array, etag = "1"): Promise<FakeOrigin> {
  const origin = fakeOrigin(content, etag);
  const file = cache.wrap(name, origin);
  expect(Buffer.from(content.buffer, content.byteOffset, content.length).equals(await readAll(file))).toBe(true);
  file.close();
  await cache.settled();
  return origin;
}

/** All chunks in the folder. */
function chunksIn(folder: string): string[] {
  const found: string[] = [];
  for (const name of readdirSync(folder))
    if (/^[0-9a-f]{2}$/.test(name))
      found.push(...readdirSync(join(folder, name)).map((chunk) => join(folder, name, chunk)));
  return found.sort();
}

/** What the folder takes on disk, with what is being written. */
function bytesIn(folder: string): number {
  let bytes = 0;
  if (!existsSync(folder)) return 0;
  for (const name of readdirSync(folder, { recursive: true }) as string[]) {
    const stat = lstatSync(join(folder, name), { throwIfNoEntry: false });
    if (stat?.isFile()) bytes += stat.blocks * 512;
  }
  return bytes;
}

/** Makes a chunk look as if it was used so long ago. */
function age(path: string, seconds: number): void {
  const time = Date.now() / 1000 - seconds;
  utimesSync(path, time, time);
}

const mostOf = { bytes: 9 * MIB + 12_345 };

describe("what it keeps", () => {
  test("is served from disk the second time, by this process and the next", async () => {
    await using opened = openCache();
    const content = randomBytes(mostOf.bytes);
    const first = await read(opened.cache, "far/file", content);
    expect(first.fetched.toSorted((a, b) => a - b)).toEqual([0, CHUNK_BYTES, 2 * CHUNK_BYTES]);
    expect(first.closed).toBe(true);
    const second = await read(opened.cache, "far/file", content);
    expect(second.fetched).toEqual([]);
    await using other = openCache({ folder: opened.folder });
    const third = await read(other.cache, "far/file", content);
    expect([third.fetched, first.reads + second.reads + third.reads]).toEqual([[], 0]);
    expect([...opened.said, ...other.said]).toEqual([]);
  });

  test("is not taken from a folder into which others may write", async () => {
    using folder = temporaryFolder();
    const content = randomBytes(1000);
    await using before = openCache({ folder: folder.path });
    await read(before.cache, "file", content);
    chmodSync(folder.path, 0o777);
    await using opened = openCache({ folder: folder.path });
    const again = await read(opened.cache, "file", content);
    expect([again.fetched, again.reads > 0]).toEqual([[], true]);
    expect(opened.said).toEqual([expect.stringContaining("others may write there")]);
  });

  test("belongs to one version of one file", async () => {
    await using opened = openCache();
    await read(opened.cache, "a", randomBytes(1000, 1), "1");
    const others = [
      await read(opened.cache, "a", randomBytes(1000, 2), "2"),
      await read(opened.cache, "b", randomBytes(1000, 3), "1"),
      await read(opened.cache, "a", randomBytes(1001, 4), "1"),
    ];
    expect(others.map(({ fetched }) => fetched)).toEqual([[0], [0], [0]]);
    expect((await read(opened.cache, "a", randomBytes(1000, 1), "1")).fetched).toEqual([]);
  });

  for (const size of [0, 1, 256 * 1024, 256 * 1024 + 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
    test(`a file of ${size} bytes`, async () => {
      await using opened = openCache();
      const content = randomBytes(size);
      await read(opened.cache, "file", content);
      expect(chunksIn(opened.folder)).toHaveLength(Math.ceil(size / CHUNK_BYTES));
      expect((await read(opened.cache, "file", content)).fetched).toEqual([]);
    });

  test("ranges that lie anyhow, read and summed up", async () => {
    await using opened = openCache();
    const content = randomBytes(mostOf.bytes);
    const file = opened.cache.wrap("file", fakeOrigin(content, "1"));
    const random = seeded(4711);
    for (let round = 0; round < 60; round++) {
      const offset = round === 0 ? CHUNK_BYTES - 10 : random(content.length);
      const length = round === 0 ? 20 : random(Math.min(content.length - offset, 3 * MIB) + 1);
      const wanted = content.subarray(offset, offset + length);
      expect(Buffer.compare(await file.read(offset, length), wanted)).toBe(0);
      expect(await file.checksum(offset, length)).toBe(Bun.hash.crc32(wanted));
      const extent = await file.descriptorFor(offset, length);
      if (!extent) continue;
      const got = new Uint8Array(length);
      readSync(extent.fd, got, 0, length, extent.offset);
      expect(Buffer.compare(got, wanted)).toBe(0);
    }
    file.close();
  });

  test("several who want the same chunk have it fetched once", async () => {
    await using opened = openCache();
    const content = randomBytes(mostOf.bytes);
    const origins = Array.from({ length: 20 }, () => fakeOrigin(content, "1"));
    const got = await Promise.all(origins.map((origin) => readAll(opened.cache.wrap("file", origin))));
    expect(got.every((bytes) => Buffer.compare(bytes, content) === 0)).toBe(true);
    expect(origins.flatMap(({ fetched }) => fetched).toSorted((a, b) => a - b)).toEqual([
      0,
      CHUNK_BYTES,
      2 * CHUNK_BYTES,
    ]);
  });

  test("so many chunks are on their way at a time, however many are wanted", async () => {
    await using opened = openCache();
    let [now, most] = [0, 0];
    const files = Array.from({ length: 60 }, (_, index) => {
      const origin = fakeOrigin(randomBytes(100, index + 1), "1");
      const fetch = origin.fetch;
      origin.fetch = async (offset, length) => {
        most = Math.max(most, ++now);
        await Bun.sleep(1);
        now--;
        return fetch(offset, length);
      };
      return opened.cache.wrap(`file ${index}`, origin);
    });
    await Promise.all(files.map(readAll));
    expect(most).toBe(16);
  });

  test("a failure to fetch is the reader's, and nothing is kept", async () => {
    await using opened = openCache();
    const origin = fakeOrigin(randomBytes(1000), "1");
    const { fetch } = origin;
    origin.fetch = () => Promise.reject(new Error("gone away"));
    const file = opened.cache.wrap("file", origin);
    expect(file.read(0, 10)).rejects.toThrow("gone away");
    await opened.cache.settled();
    expect([chunksIn(opened.folder), readdirSync(join(opened.folder, "new"))]).toEqual([[], []]);
    origin.fetch = fetch;
    expect(await file.read(0, 10)).toHaveLength(10);
    file.close();
  });

  test("no descriptor stays open", async () => {
    const open = () => readdirSync("/proc/self/fd").length;
    const before = open();
    {
      await using opened = openCache({ maxBytes: 20 * MIB });
      for (let index = 0; index < 8; index++)
        await read(opened.cache, `file ${index}`, randomBytes(mostOf.bytes, index + 1));
    }
    expect(open()).toBe(before);
  });
});

describe("damage", () => {
  const content = randomBytes(mostOf.bytes);
  const damages: Record<string, (path: string) => void> = {
    "a flipped bit": (path) => patch(path, 1_000_000, (byte) => byte ^ 1),
    "a flipped bit in a sum": (path) => patch(path, CHUNK_BYTES + 5, (byte) => byte ^ 1),
    "a flipped bit in the trailer": (path) => patch(path, lstatSync(path).size - 1, (byte) => byte ^ 1),
    "half of it": (path) => truncateSync(path, CHUNK_BYTES / 2),
    "nothing of it": (path) => truncateSync(path, 0),
    "its content alone": (path) => truncateSync(path, CHUNK_BYTES),
    "zeros, as after a power cut": (path) => writeFileSync(path, new Uint8Array(lstatSync(path).size)),
    "zeros at its end": (path) => {
      const { size } = lstatSync(path);
      truncateSync(path, size - 600_000);
      truncateSync(path, size);
    },
    "zeros in its middle": (path) => {
      const bytes = readFileSync(path);
      writeFileSync(path, bytes.fill(0, 2 * MIB, 2 * MIB + 4096));
    },
    "another chunk": (path) => {
      const other = chunksIn(dirname(dirname(path))).find((name) => name.endsWith("-1"))!;
      writeFileSync(path, readFileSync(other));
    },
    "a folder": (path) => {
      rmSync(path);
      mkdirSync(path);
    },
  };
  for (const [what, damage] of Object.entries(damages))
    test(`${what} in place of a chunk is never served`, async () => {
      await using opened = openCache();
      await read(opened.cache, "file", content);
      const chunk = chunksIn(opened.folder).find((name) => name.endsWith("-0"))!;
      damage(chunk);
      // Whoever wrote it knows it as it was.
      await using other = openCache({ folder: opened.folder });
      const origin = await read(other.cache, "file", content);
      if (what === "a folder") {
        // It is nobody's to remove: that chunk is not kept.
        expect(origin.reads).toBeGreaterThan(0);
        return;
      }
      expect([origin.fetched, origin.reads, other.said.length]).toEqual([[0], 0, 1]);
      expect((await read(other.cache, "file", content)).fetched).toEqual([]);
    });

  test("in many chunks is told once", async () => {
    await using opened = openCache();
    await read(opened.cache, "file", content);
    for (const path of chunksIn(opened.folder)) truncateSync(path, 10);
    await using other = openCache({ folder: opened.folder });
    expect((await read(other.cache, "file", content)).fetched).toHaveLength(3);
    expect(other.said).toHaveLength(1);
  });

  test("in a chunk that is open is found before it is sent", async () => {
    await using opened = openCache();
    await read(opened.cache, "file", content);
    await using other = openCache({ folder: opened.folder });
    const origin = fakeOrigin(content, "1");
    const file = other.cache.wrap("file", origin);
    await file.read(0, 1000);
    patch(chunksIn(opened.folder).find((name) => name.endsWith("-0"))!, 3 * MIB, (byte) => byte ^ 0x80);
    expect(Buffer.compare(await readAll(file), content)).toBe(0);
    expect(origin.fetched).toEqual([0]);
    file.close();
  });

  function patch(path: string, at: number, change: (byte: number) => number): void {
    const fd = openSync(path, "r+");
    const byte = new Uint8Array(1);
    readSync(fd, byte, 0, 1, at);
    byte[0] = change(byte[0]!);
    writeSync(fd, byte, 0, 1, at);
    closeSync(fd);
  }
});

describe("room", () => {
  test("what was used least recently goes first, and a hit is a use", async () => {
    await using opened = openCache({ maxBytes: 100 * MIB });
    const content = (index: number) => randomBytes(4 * MIB - 8192, index + 1);
    const paths: string[] = [];
    for (let index = 0; index < 20; index++) {
      const before = new Set(chunksIn(opened.folder));
      await read(opened.cache, `file ${index}`, content(index));
      paths.push(chunksIn(opened.folder).find((path) => !before.has(path))!);
    }
    // The first is the oldest; then the first three are used again.
    for (const [index, path] of paths.entries()) age(path, 1000 - index);
    for (const index of [0, 1, 2])
      expect((await read(opened.cache, `file ${index}`, content(index))).fetched).toEqual([]);
    let index = 20;
    while (chunksIn(opened.folder).length === index && index < 40)
      await read(opened.cache, `file ${index}`, content(index++));
    const left = new Set(chunksIn(opened.folder));
    const gone = paths.flatMap((path, number) => (left.has(path) ? [] : [number]));
    // With 24 of them it is full, with 21 there is room.
    expect(index).toBe(24);
    expect(gone).toEqual([3, 4, 5]);
  });

  test("a time to come does not keep a chunk for ever", async () => {
    await using opened = openCache({ maxBytes: 64 * MIB });
    await read(opened.cache, "from a clock that was wrong", randomBytes(1000));
    const [path] = chunksIn(opened.folder);
    age(path!, -1_000_000);
    for (let index = 0; index < 16; index++) await read(opened.cache, `file ${index}`, randomBytes(4 * MIB, index + 1));
    expect(chunksIn(opened.folder)).not.toContain(path!);
  });

  test("the smallest cache goes on keeping", async () => {
    await using opened = openCache({ maxBytes: 64 * MIB });
    for (let index = 0; index < 40; index++) {
      const origin = await read(opened.cache, `file ${index}`, randomBytes(4 * MIB, index + 1));
      expect([origin.fetched, origin.reads]).toEqual([[0], 0]);
      expect(bytesIn(opened.folder)).toBeLessThanOrEqual(64 * MIB);
    }
    expect((await read(opened.cache, "file 39", randomBytes(4 * MIB, 40))).fetched).toEqual([]);
  });

  test("there are only so many small chunks", async () => {
    await using opened = openCache({ maxBytes: 64 * MIB });
    for (let index = 0; index < 1100; index++) await read(opened.cache, `file ${index}`, randomBytes(10, index + 1));
    expect(chunksIn(opened.folder).length).toBeLessThanOrEqual(1024);
    expect(chunksIn(opened.folder).length).toBeGreaterThan(900);
  });

  test("what was kept under a larger bound goes at the start, and what is none of the cache's stays", async () => {
    await using opened = openCache();
    for (let index = 0; index < 10; index++) await read(opened.cache, `file ${index}`, randomBytes(4 * MIB, index + 1));
    const foreign = ["README", "3f/README", "new/README", "usage.bak"].map((name) => join(opened.folder, name));
    mkdirSync(join(opened.folder, "3f"), { recursive: true });
    for (const path of foreign) {
      writeFileSync(path, "mine");
      age(path, 1_000_000);
    }
    await using smaller = openCache({ folder: opened.folder, maxBytes: 20 * MIB });
    await smaller.cache.settled();
    expect(bytesIn(opened.folder)).toBeLessThanOrEqual(20 * MIB);
    expect(chunksIn(opened.folder).filter((path) => !path.endsWith("README"))).toHaveLength(2);
    expect(foreign.map((path) => readFileSync(path, "utf8"))).toEqual(["mine", "mine", "mine", "mine"]);
  });

  test("what a process that was killed left of its writing goes, but not what is being written", async () => {
    await using opened = openCache();
    await read(opened.cache, "file", randomBytes(1000));
    const name = chunksIn(opened.folder)[0]!.split("/").pop()!;
    const [left, running] = [
      join(opened.folder, "new", `${name}.1.1.4096`),
      join(opened.folder, "new", `${name}.2.1.4096`),
    ];
    writeFileSync(left, "a part of it");
    writeFileSync(running, "a part of it");
    age(left, 3600);
    await using other = openCache({ folder: opened.folder });
    await other.cache.settled();
    expect(readdirSync(join(opened.folder, "new"))).toEqual([`${name}.2.1.4096`]);
  });

  for (const [what, write] of Object.entries({
    "not there": (path: string) => rmSync(path),
    "all zeros": (path: string) => writeFileSync(path, new Uint8Array(20)),
    "too high": (path: string) => writeFileSync(path, countOf(900 * MIB, 300)),
    "too low": (path: string) => writeFileSync(path, countOf(1, 0)),
  }))
    test(`a count that is ${what} is put right`, async () => {
      await using opened = openCache({ maxBytes: 64 * MIB });
      for (let index = 0; index < 5; index++)
        await read(opened.cache, `file ${index}`, randomBytes(4 * MIB, index + 1));
      write(join(opened.folder, "usage"));
      await using other = openCache({ folder: opened.folder, maxBytes: 64 * MIB });
      await other.cache.settled();
      const usage = readFileSync(join(opened.folder, "usage"));
      expect([usage.readDoubleBE(0), usage.readDoubleBE(8)]).toEqual([
        chunksIn(opened.folder).reduce((sum, path) => sum + lstatSync(path).blocks * 512, 0),
        5,
      ]);
    });

  function countOf(bytes: number, files: number): Buffer {
    const count = Buffer.alloc(20);
    count.writeDoubleBE(bytes, 0);
    count.writeDoubleBE(files, 8);
    count.writeUInt32BE(Bun.hash.crc32(count.subarray(0, 16)), 16);
    return count;
  }

  test("a chunk that is removed while it is sent stays readable", async () => {
    await using opened = openCache({ maxBytes: 64 * MIB });
    const content = randomBytes(4 * MIB);
    const origin = fakeOrigin(content, "1");
    const file = opened.cache.wrap("sent", origin);
    const extent = (await file.descriptorFor(0, 256 * 1024))!;
    const [path] = chunksIn(opened.folder);
    age(path!, 1000);
    for (let index = 0; index < 16; index++)
      await read(opened.cache, `file ${index}`, randomBytes(4 * MIB - 8192, index + 1));
    expect(chunksIn(opened.folder)).not.toContain(path!);
    expect(fstatSync(extent.fd).nlink).toBe(0);
    expect(Buffer.compare(await readAll(file), content)).toBe(0);
    expect([origin.fetched, origin.reads]).toEqual([[0], 0]);
    file.close();
  });

  test("the whole folder may be removed meanwhile", async () => {
    await using opened = openCache();
    await read(opened.cache, "file", randomBytes(1000));
    rmSync(opened.folder, { recursive: true });
    expect((await read(opened.cache, "file", randomBytes(1000))).fetched).toEqual([0]);
    expect((await read(opened.cache, "file", randomBytes(1000))).fetched).toEqual([]);
  });
});

describe("a cache that can't be used", () => {
  const content = randomBytes(mostOf.bytes);

  test.skipIf(!isRoot)("a full disk: read where it comes from, said once", async () => {
    using disk = mountSmall("6M");
    if (!disk) return;
    await using opened = openCache({ folder: join(disk.path, "cache") });
    expect((await read(opened.cache, "file", content)).reads).toBeGreaterThan(0);
    expect((await read(opened.cache, "file", content)).reads).toBeGreaterThan(0);
    expect((await read(opened.cache, "other", content)).reads).toBeGreaterThan(0);
    expect(opened.said).toHaveLength(1);
    expect(opened.said[0]).toContain("ENOSPC");
    expect(readdirSync(join(opened.folder, "new"))).toEqual([]);
    // What found room is used all the same.
    expect(chunksIn(opened.folder)).not.toEqual([]);
    expect((await read(opened.cache, "file", content)).fetched).toEqual([]);
  });

  test.skipIf(!isRoot)("a disk that becomes read-only: what is there is served", async () => {
    using disk = mountSmall("30M");
    if (!disk) return;
    await using opened = openCache({ folder: join(disk.path, "cache") });
    await read(opened.cache, "file", content);
    // Else it is busy.
    await opened.cache.close();
    expect(Bun.spawnSync(["mount", "-o", "remount,ro", disk.path]).exitCode).toBe(0);
    await using other = openCache({ folder: opened.folder });
    await other.cache.settled();
    const [known, unknown] = [await read(other.cache, "file", content), await read(other.cache, "other", content)];
    expect([known.fetched, known.reads]).toEqual([[], 0]);
    expect(unknown.reads).toBeGreaterThan(0);
    expect(other.said).toHaveLength(1);
  });

  test("a folder that can't be made", async () => {
    using folder = temporaryFolder();
    writeFileSync(join(folder.path, "file"), "");
    await using opened = openCache({ folder: join(folder.path, "file") });
    const origin = await read(opened.cache, "file", content);
    expect([origin.fetched, origin.reads > 0]).toEqual([[], true]);
    expect(opened.said).toHaveLength(1);
  });

  test("a lock that somebody keeps", async () => {
    await using opened = openCache();
    await read(opened.cache, "known", content);
    const holder = Bun.spawn(["flock", "-F", join(opened.folder, "usage"), "sh", "-c", "echo held; exec sleep 1000"], {
      stdout: "pipe",
    });
    await holder.stdout.getReader().read();
    const [known, unknown] = [await read(opened.cache, "known", content), await read(opened.cache, "unknown", content)];
    expect([known.fetched, unknown.fetched, unknown.reads > 0]).toEqual([[], [], true]);
    killHard(holder.pid);
    await holder.exited;
    await waitFor("the lock is free", async () => (await read(opened.cache, "another", content)).fetched.length > 0);
  });
});

describe("several processes", () => {
  const running = new Set<Bun.Subprocess>();
  afterAll(() => {
    for (const child of running) killHard(child.pid);
  });

  function startReader(settings: ReaderSettings) {
    const child = Bun.spawn([process.execPath, join(import.meta.dir, "cachereader.ts"), JSON.stringify(settings)], {
      stdout: "pipe",
      stderr: "inherit",
    });
    running.add(child);
    const lines: string[] = [];
    const reading = (async () => {
      let rest = "";
      const decoder = new TextDecoder();
      for await (const bytes of child.stdout) {
        const found = (rest + decoder.decode(bytes, { stream: true })).split("\n");
        rest = found.pop()!;
        lines.push(...found);
      }
    })();
    const ended = async () => {
      await Promise.all([child.exited, reading]);
      running.delete(child);
    };
    return { pid: child.pid, lines, ended };
  }

  const sizes = Array.from(
    { length: 24 },
    (_, index) => [9 * MIB + 17, 70_000, 4 * MIB, 1, 5 * MIB, 300_000][index % 6]!,
  );

  test("kill -9 at any moment: nothing else is served than was fetched, and the bound holds", async () => {
    using folder = temporaryFolder();
    const settings = { folder: join(folder.path, "cache"), maxBytes: 48 * MIB, sizes };
    const random = seeded(Date.now());
    const all: string[] = [];
    let most = 0;
    let readers = [startReader(settings), startReader(settings)];
    for (let round = 0; round < 12; round++) {
      for (const { lines } of readers) await waitFor("it reads", () => lines.length > 0);
      const victim = readers[round % 2]!;
      // Somewhere within the next files.
      const until = victim.lines.length + random(12);
      await waitFor("it goes on", () => victim.lines.length >= until);
      for (let spin = random(20_000); spin > 0; spin--) performance.now();
      most = Math.max(most, bytesIn(settings.folder));
      killHard(victim.pid);
      await victim.ended();
      all.push(...victim.lines);
      readers = readers.map((reader) => (reader === victim ? startReader(settings) : reader));
    }
    for (const { pid, lines, ended } of readers) {
      killHard(pid);
      await ended();
      all.push(...lines);
    }
    expect(all.filter((line) => !line.startsWith("read "))).toEqual([]);
    expect(all.filter((line) => line.endsWith("from the cache")).length).toBeGreaterThan(0);
    // Eight chunks are on their way in each of them at the most, and all that was left by those killed.
    expect(most).toBeLessThanOrEqual(settings.maxBytes + 2 * 8 * CHUNK_BYTES);
    // And whoever comes after them finds what they left to be right, in order, and within the bound.
    await using after = openCache(settings);
    await after.cache.settled();
    for (const [index, size] of sizes.entries())
      await read(after.cache, `file ${index}`, randomBytes(size, index + 1), `version of ${index}`);
    expect(after.said).toEqual([]);
  });

  test("parallel writers stay within the bound, and keep using it", async () => {
    using folder = temporaryFolder();
    const settings = { folder: join(folder.path, "cache"), maxBytes: 40 * MIB, sizes, count: 80 };
    const readers = Array.from({ length: 3 }, () => startReader(settings));
    let isOver = false;
    let most = 0;
    const ended = Promise.all(readers.map((reader) => reader.ended())).then(() => {
      isOver = true;
    });
    while (!isOver) {
      most = Math.max(most, bytesIn(settings.folder));
      await Bun.sleep(2);
    }
    await ended;
    const all = readers.flatMap(({ lines }) => lines);
    expect(all.filter((line) => !line.startsWith("read "))).toEqual([]);
    expect(all).toHaveLength(240);
    expect(most).toBeGreaterThan(settings.maxBytes / 2);
    // What is removed and still open is not seen here; what is counted is counted before it is written.
    expect(most).toBeLessThanOrEqual(settings.maxBytes + 2 * CHUNK_BYTES);
  });
});
