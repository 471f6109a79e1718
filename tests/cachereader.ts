/**
 * A process that reads files at random by way of a cache, and compares what it gets, until it is killed: for
 * cache.test.ts. Its argument is JSON: see `ReaderSettings`. A line on stdout for each file that it has read.
 */
import { readSync } from "node:fs";
import { Cache, type Origin } from "../cache.ts";
import type { OpenFile } from "../storage.ts";
import { randomBytes } from "./fixtures.ts";

export interface ReaderSettings {
  folder: string;
  maxBytes: number;
  /** Sizes of the files that there are. */
  sizes: number[];
  /** Ends after so many files, else never. */
  count?: number;
}

const PIECE_BYTES = 256 * 1024;

export interface FakeOrigin extends Origin {
  /** What was fetched, by its offset, and what was read past the cache. */
  fetched: number[];
  reads: number;
  closed: boolean;
}

/** A file that is far away. */
export function fakeOrigin(content: Uint8Array, etag: string): FakeOrigin {
  const origin: FakeOrigin = {
    fd: undefined,
    meta: { kind: "file", size: content.length, mtime: 0, etag },
    fetched: [],
    reads: 0,
    closed: false,
    descriptorFor: () => undefined,
    async read(offset, length) {
      origin.reads++;
      return content.slice(offset, offset + length);
    },
    checksum: async (offset, length) => Bun.hash.crc32(content.subarray(offset, offset + length)),
    async fetch(offset, length) {
      origin.fetched.push(offset);
      await Bun.sleep(0);
      return content.slice(offset, offset + length);
    },
    verify() {},
    close() {
      origin.closed = true;
    },
  };
  return origin;
}

/** As a session reads it: by descriptor where there is one, with its checksum. Throws if that is wrong. */
export async function readAll(file: OpenFile): Promise<Uint8Array> {
  const { size } = file.meta;
  const content = new Uint8Array(size);
  for (let at = 0; at < size; at += PIECE_BYTES) {
    const length = Math.min(PIECE_BYTES, size - at);
    const piece = content.subarray(at, at + length);
    const extent = await file.descriptorFor(at, length);
    if (extent) {
      const sum = await file.checksum(at, length);
      const count = readSync(extent.fd, piece, 0, length, extent.offset);
      if (count !== length || Bun.hash.crc32(piece) !== sum)
        throw new Error(`Wrong at ${at}: ${count} of ${length} bytes`);
    } else piece.set(await file.read(at, length));
  }
  return content;
}

async function readForEver({
  folder,
  maxBytes,
  sizes,
  count = Number.POSITIVE_INFINITY,
}: ReaderSettings): Promise<void> {
  const files = sizes.map((size, index) => randomBytes(size, index + 1));
  const cache = Cache.open(folder, { maxBytes, workers: 2, say: (problem) => console.log(`problem ${problem}`) });
  const readOne = async (index: number) => {
    const origin = fakeOrigin(files[index]!, `version of ${index}`);
    const file = cache.wrap(`file ${index}`, origin);
    const content = await readAll(file).catch((error) => console.log(`wrong ${index}: ${error}`));
    if (content && !Buffer.from(files[index]!.buffer, 0, content.length).equals(content)) console.log(`wrong ${index}`);
    console.log(`read ${index} ${origin.fetched.length === 0 && origin.reads === 0 ? "from the cache" : "anew"}`);
    file.close();
  };
  for (let done = 0; done < count; done += 4)
    await Promise.all(Array.from({ length: 4 }, () => readOne(Math.floor(Math.random() * files.length))));
  await cache.close();
}

if (import.meta.main) await readForEver(JSON.parse(process.argv[2]!));
