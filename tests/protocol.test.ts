/** Golden bytes of each frame, and a decoder that meets every cut and every flipped bit. */

import { heapStats } from "bun:jsc";
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { crc32 } from "node:zlib";
import {
  type Answer,
  BufferPool,
  crc32Combine,
  decodeAnswer,
  decodeContent,
  decodeHello,
  decodeRequest,
  EntriesEncoder,
  ERRORS,
  encodeDataHeader,
  encodeEnd,
  encodeError,
  encodeHello,
  encodeInfo,
  encodeMeta,
  encodeRedirect,
  encodeRequest,
  encodeSum,
  encodeWait,
  encodeWelcome,
  type Frame,
  FrameDecoder,
  HEADER_BYTES,
  MAX_ANSWER_BYTES,
  MAX_CONTENT_BYTES,
  quote,
  RepriseError,
  type Request,
  splitPath,
  TO_THE_END,
  UNKNOWN_SIZE,
} from "../protocol.ts";
import { randomBytes, TEST_MS } from "./fixtures.ts";

// Two hundred thousand streams take their time on a busy machine.
setDefaultTimeout(TEST_MS);

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const bytesOf = (text: string) => new Uint8Array(Buffer.from(text.replace(/\s/g, ""), "hex"));

function onlyFrame(bytes: Uint8Array): Frame {
  const decoder = new FrameDecoder({ maxLength: MAX_ANSWER_BYTES });
  decoder.push(bytes);
  const frame = decoder.next()!;
  expect(decoder.next()).toBeUndefined();
  expect(decoder.atBoundary).toBe(true);
  return frame;
}

function data(content: Uint8Array): Uint8Array {
  return Buffer.concat([encodeDataHeader(content.length, crc32(content)), content]);
}

function list(...entries: Parameters<EntriesEncoder["add"]>[0][]): Uint8Array {
  const encoder = new EntriesEncoder();
  for (const entry of entries) encoder.add(entry);
  return encoder.rest()!;
}

/** An upload's: 32 hexadecimal digits. */
const ID = "ab".repeat(16);
const ID_HEX = "6162".repeat(16);

describe("golden bytes", () => {
  test("HELLO", () => {
    expect(hex(encodeHello({ token: "ab" }))).toBe(
      hex(bytesOf("0000000e 01 76273964 52505253 0001 00000000 0002 6162")),
    );
    expect(decodeHello(onlyFrame(encodeHello({ token: "ab" })))).toEqual({ version: 1, flags: 0, token: "ab" });
  });

  const requests: [Request, string][] = [
    [
      { action: "get", path: "a/b", offset: 5, length: TO_THE_END, etag: "xy" },
      "00000019 10 5cc4706e 0000000000000005 001fffffffffffff 0002 7879 0003 612f62",
    ],
    [{ action: "list", path: "é", recursive: true }, "00000005 11 0801f4f0 01 0002 c3a9"],
    [{ action: "list", path: "", recursive: false }, "00000003 11 ca279543 00 0000"],
    [{ action: "stat", path: "f" }, "00000003 12 6558cf81 0001 66"],
    [{ action: "status" }, "00000000 13 429cb6c3"],
    [{ action: "quit" }, "00000000 1f 4b2afae8"],
    [
      {
        action: "put",
        offset: 5,
        size: 2 ** 40,
        mtime: -1,
        noClobber: true,
        parents: false,
        id: ID,
        etag: "xy",
        path: "a/b",
      },
      `00000044 20 76986a1f 0000000000000005 0000010000000000 ffffffffffffffff 01 0020 ${ID_HEX} 0002 7879 0003 612f62`,
    ],
    [
      {
        action: "put",
        offset: 0,
        size: UNKNOWN_SIZE,
        mtime: 1,
        noClobber: false,
        parents: false,
        id: "",
        etag: "",
        path: "f",
      },
      "00000020 20 04895f5c 0000000000000000 001fffffffffffff 0000000000000001 00 0000 0000 0001 66",
    ],
    [
      {
        ...{
          action: "put",
          offset: 0,
          size: 2,
          mtime: 1,
          noClobber: false,
          parents: true,
          id: "",
          etag: "",
          path: "f",
        },
        content: bytesOf("6869"),
      },
      "00000022 20 22ed50f6 0000000000000000 0000000000000002 0000000000000001 06 0000 0000 0001 66 6869",
    ],
    [{ action: "remove", path: "d", recursive: true }, "00000004 21 6a41a369 01 0001 64"],
    [{ action: "remove", path: "f", recursive: false }, "00000004 21 3cf3a520 00 0001 66"],
    [{ action: "move", path: "a", to: "b/c", overwrite: true }, "00000009 22 0cbbef88 01 0001 61 0003 622f63"],
    [{ action: "move", path: "a", to: "b", overwrite: false }, "00000007 22 a0ba466e 00 0001 61 0001 62"],
    [{ action: "mkdir", path: "a/b", parents: true }, "00000006 23 72e17e2f 01 0003 612f62"],
    [{ action: "mkdir", path: "é", parents: false }, "00000005 23 7cd37be6 00 0002 c3a9"],
    [{ action: "sums", id: ID, path: "" }, `00000024 24 bd5cb8b5 0020 ${ID_HEX} 0000`],
    [{ action: "link", message: { a: 1 } }, "00000007 30 510e8b0a 7b2261223a317d"],
    [{ action: "sums", id: "", path: "f" }, "00000005 24 9045f5dd 0000 0001 66"],
  ];
  test.each(requests)("%o", (request, golden) => {
    expect(hex(encodeRequest(request))).toBe(hex(bytesOf(golden)));
    expect(decodeRequest(onlyFrame(bytesOf(golden)))).toEqual(request);
  });

  const entry = { kind: "folder", size: 0, mtime: -1, path: "d" } as const;
  const answers: [string, Uint8Array, string, Answer][] = [
    [
      "WELCOME",
      encodeWelcome("r 1"),
      "00000007 80 0649ca91 0001 0003 722031",
      { type: "welcome", version: 1, software: "r 1" },
    ],
    [
      "REDIRECT",
      encodeRedirect("h", 2121),
      "00000006 81 604b3953 0849 00 0001 68",
      { type: "redirect", host: "h", port: 2121, direct: false },
    ],
    [
      "REDIRECT to who answers itself",
      encodeRedirect("h", 2121, true),
      "00000006 81 d8f75e36 0849 01 0001 68",
      { type: "redirect", host: "h", port: 2121, direct: true },
    ],
    [
      "ERROR",
      encodeError(new RepriseError("changed", "no")),
      "00000006 82 18d6589e 0006 0002 6e6f",
      { type: "error", error: new RepriseError("changed", "no") },
    ],
    [
      "META",
      encodeMeta({ kind: "file", size: 2 ** 40, mtime: 1_000_001, etag: "e" }, 7),
      "0000001c 83 b6a618d9 01 0000010000000000 00000000000f4241 0000000000000007 0001 65",
      { type: "meta", kind: "file", size: 2 ** 40, mtime: 1_000_001, offset: 7, etag: "e" },
    ],
    [
      "DATA",
      data(bytesOf("0102")),
      "00000002 84 264cf4c4 0102",
      { type: "data", crc32: 0xb6cc4292, content: bytesOf("0102") },
    ],
    ["END", encodeEnd(258), "00000008 85 c774131b 0000000000000102", { type: "end", count: 258 }],
    [
      "ENTRIES",
      list(entry),
      "00000014 86 b7f6c3b5 02 0000000000000000 ffffffffffffffff 0001 64",
      { type: "entries", entries: [entry] },
    ],
    ["INFO", encodeInfo({ a: 1 }), "00000007 87 8d3d54b4 7b2261223a317d", { type: "info", info: { a: 1 } }],
    [
      "SUM",
      encodeSum(2 ** 24, 0xdeadbeef),
      "0000000c 88 8801ea32 0000000001000000 deadbeef",
      { type: "sum", length: 2 ** 24, crc32: 0xdeadbeef },
    ],
    ["WAIT", encodeWait(), "00000000 89 5246cc99", { type: "wait" }],
  ];
  test.each(answers)("%s", (_, encoded, golden, answer) => {
    expect(hex(encoded)).toBe(hex(bytesOf(golden)));
    expect(decodeAnswer(onlyFrame(bytesOf(golden)))).toEqual(answer);
  });

  test("DATA and END to the server", () => {
    const content = { type: "data", crc32: 0xb6cc4292, content: bytesOf("0102") } as const;
    expect(decodeContent(onlyFrame(bytesOf("00000002 84 264cf4c4 0102")))).toEqual(content);
    expect(decodeContent(onlyFrame(bytesOf("00000008 85 c774131b 0000000000000102")))).toEqual({
      type: "end",
      count: 258,
    });
  });

  test("error numbers are each used once", () => {
    const numbers = Object.values(ERRORS).map((row) => row.number);
    expect(new Set(numbers).size).toBe(numbers.length);
  });
});

describe("FrameDecoder", () => {
  test("at rest it keeps none of the chunks that it was given", () => {
    const chunkBytes = 256 * 1024;
    Bun.gc(true);
    const { extraMemorySize: before } = heapStats();
    const decoders = Array.from({ length: 256 }, () => {
      const decoder = new FrameDecoder({ maxLength: chunkBytes });
      decoder.push(data(new Uint8Array(chunkBytes - HEADER_BYTES)));
      expect(decoder.next()).toBeDefined();
      expect(decoder.next()).toBeUndefined();
      return decoder;
    });
    Bun.gc(true);
    // A few may still be seen on the stack.
    expect(heapStats().extraMemorySize - before).toBeLessThan(32 * chunkBytes);
    expect(decoders.every((decoder) => decoder.atBoundary)).toBe(true);
  });

  const content = randomBytes(300, 3);
  const stream = Buffer.concat([
    encodeWelcome("reprise"),
    encodeMeta({ kind: "file", size: 300, mtime: 5, etag: "abc" }),
    data(content),
    encodeEnd(300),
  ]);

  function decodeAll(pieces: Uint8Array[], direct = false, answers: Answer[] = []): Answer[] {
    const decoder = new FrameDecoder({ maxLength: 4096, pool: new BufferPool(4096 + 2 * HEADER_BYTES) });
    const drain = () => {
      for (let frame = decoder.next(); frame; frame = decoder.next()) answers.push(decodeAnswer(frame));
    };
    for (const piece of pieces) {
      if (direct) for (let at = 0; at < piece.length; ) at += receive(decoder, piece.subarray(at), drain);
      else decoder.push(piece);
      drain();
    }
    return answers;
  }

  /** As the connection does: first ask for what is there, then receive into the space that is left. */
  function receive(decoder: FrameDecoder, bytes: Uint8Array, drain: () => void): number {
    drain();
    const space = decoder.space();
    const count = Math.min(space.length, bytes.length);
    space.set(bytes.subarray(0, count));
    decoder.filled(count);
    return count;
  }

  const whole = decodeAll([stream]);

  test("gives the frames (whole stream)", () => {
    expect(whole.map((answer) => answer.type)).toEqual(["welcome", "meta", "data", "end"]);
  });

  test("gives the same frames (cut at every byte, pushed or received)", () => {
    for (let cut = 0; cut <= stream.length; cut++) {
      const pieces = [stream.subarray(0, cut), stream.subarray(cut)];
      expect(decodeAll(pieces)).toEqual(whole);
      expect(decodeAll(pieces, true)).toEqual(whole);
    }
  });

  test("gives the same frames (one byte at a time)", () => {
    const bytes = [...stream].map((byte) => new Uint8Array([byte]));
    expect(decodeAll(bytes)).toEqual(whole);
    expect(decodeAll(bytes, true)).toEqual(whole);
  });

  test("takes a length up to the limit and refuses one more, before anything else has come", () => {
    for (const length of [999, 1000]) {
      const decoder = new FrameDecoder({ maxLength: 1000 });
      decoder.push(data(new Uint8Array(length)));
      expect(decoder.next()!.payload.length).toBe(length);
    }
    for (const length of [1001, 2 ** 31, 2 ** 32 - 1]) {
      const refusing = new FrameDecoder({ maxLength: 1000 });
      refusing.push(encodeDataHeader(length, 0).subarray(0, 4));
      expect(() => refusing.next()).toThrow("frame of");
      expect(() => refusing.next()).toThrow("frame of");
    }
  });

  test("a large payload is from the pool, and stays as it is until it is given back", () => {
    const bytes = MAX_CONTENT_BYTES / 2;
    const pool = new BufferPool(bytes + 2 * HEADER_BYTES);
    const decoder = new FrameDecoder({ maxLength: bytes, pool });
    const first = data(new Uint8Array(bytes).fill(1));
    const second = data(new Uint8Array(bytes).fill(2));
    decoder.push(first.subarray(0, 500));
    expect(decoder.next()).toBeUndefined();
    decoder.push(Buffer.concat([first.subarray(500), second.subarray(0, 300)]));
    const one = decoder.next()!;
    expect(decoder.next()).toBeUndefined();
    decoder.push(second.subarray(300));
    const two = decoder.next()!;
    expect(new Set(one.payload)).toEqual(new Set([1]));
    expect(new Set(two.payload)).toEqual(new Set([2]));
    pool.give(one.payload);
    expect(pool.take(10)!.buffer === one.payload.buffer).toBe(true);
  });

  test("a small payload is not from the pool", () => {
    const pool = new BufferPool(4096);
    const decoder = new FrameDecoder({ maxLength: 1000, pool });
    const frame = data(new Uint8Array(1000));
    decoder.push(frame.subarray(0, 500));
    expect(decoder.next()).toBeUndefined();
    decoder.push(frame.subarray(500));
    const { payload } = decoder.next()!;
    pool.give(payload);
    expect(pool.take(10)!.buffer === payload.buffer).toBe(false);
  });

  test("gives all messages or an error, and never a crash (200,000 seeded streams, half with a flipped bit)", () => {
    const random = seeded(20_261_122);
    for (let round = 0; round < 200_000; round++) {
      const bytes = new Uint8Array(stream);
      const flipped = round % 2 === 1;
      if (flipped) bytes[random(bytes.length)]! ^= 1 << random(8);
      const pieces: Uint8Array[] = [];
      for (let at = 0; at < bytes.length; ) {
        const size = 1 + random(120);
        pieces.push(bytes.subarray(at, at + size));
        at += size;
      }
      const answers = decodeOrError(pieces);
      if (flipped) expect(answers).toEqual(whole.slice(0, answers.length));
      else expect(answers.length).toBe(whole.length);
    }
  });

  /** What came before the damage. */
  function decodeOrError(pieces: Uint8Array[]): Answer[] {
    const answers: Answer[] = [];
    try {
      decodeAll(pieces, false, answers);
    } catch (error) {
      if (!(error instanceof RepriseError) || !["bad_frame", "checksum"].includes(error.code)) throw error;
    }
    return answers;
  }
});

/** Numbers below `limit`, the same for the same seed. */
function seeded(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * limit);
  };
}

describe("decoding refuses", () => {
  const refused: [string, string][] = [
    ["a number over 2^53-1", "00000014 10 4c999a86 0020000000000000 0000000000000001 0000 0000"],
    ["a negative number", "00000014 10 89733c4a ffffffffffffffff 0000000000000001 0000 0000"],
    ["a string that is not UTF-8", "00000004 12 b15e6a43 0002 c328"],
    ["an overlong UTF-8 slash", "00000004 12 e9af2f03 0002 c0af"],
    ["a string longer than its frame", "00000003 12 01340a85 0005 66"],
    ["a path over the limit", "00000003 12 797e6cf1 1001 66"],
    ["bytes left over", "00000004 12 55dd344c 0001 66 00"],
    ["an unknown type", "00000000 2f 6df3ca44"],
    ["an answer as a request", "00000008 85 c774131b 0000000000000102"],
    [
      "a PUT of more than 2^53-1 bytes",
      "00000020 20 af0ea0f0 0000000000000000 0020000000000000 0000000000000001 00 0000 0000 0001 66",
    ],
    [
      "a PUT from a negative offset on",
      "00000020 20 b337456f ffffffffffffffff 0000000000000001 0000000000000001 00 0000 0000 0001 66",
    ],
    [
      "a PUT with a time before -2^53",
      "00000020 20 61cb9e9c 0000000000000000 0000000000000001 8000000000000000 00 0000 0000 0001 66",
    ],
    [
      "a PUT with an etag of 256 bytes",
      `00000120 20 5dd82105 0000000000000000 0000000000000001 0000000000000001 00 0000 0100 ${"00".repeat(256)} 0001 66`,
    ],
    [
      "a PUT with content that it does not announce",
      "00000022 20 2ff320b1 0000000000000000 0000000000000002 0000000000000001 00 0000 0000 0001 66 6869",
    ],
    ["a MOVE with one path", "00000004 22 e5374a53 00 0001 61"],
    ["bytes left over in a MKDIR", "00000005 23 4dae0098 00 0001 61 00"],
    ["content as a request", "00000002 84 264cf4c4 0102"],
  ];
  test.each(refused)("%s", (_, bytes) => {
    expect(() => decodeRequest(onlyFrame(bytesOf(bytes)))).toThrow("not the reprise protocol");
  });

  test.each([
    ["a request in the middle of an upload", "00000003 11 ca279543 00 0000"],
    ["a DATA without content", "00000000 84 2cf7b024"],
    ["bytes left over in an END", "00000009 85 b3c1b446 0000000000000001 00"],
  ])("%s", (_, bytes) => {
    expect(() => decodeContent(onlyFrame(bytesOf(bytes)))).toThrow("not the reprise protocol");
  });

  test("a HELLO without its magic, but not one of another version", () => {
    expect(() => decodeHello(onlyFrame(bytesOf("00000008 01 b219a5f9 52505254 0001 0000")))).toThrow("magic");
    expect(decodeHello(onlyFrame(bytesOf("00000007 01 0c713372 52505253 0009 ff"))).version).toBe(9);
  });
});

describe("splitPath()", () => {
  test("accepts every literal name", () => {
    for (const path of ["a", "a/b", " ", "…", "a\\b", "%2e%2e", "C:x", "-", ".hidden", "..a", "a".repeat(255)]) {
      expect(splitPath(path)).toEqual(path.split("/"));
    }
    expect(splitPath("")).toEqual([]);
  });
  const bad = [
    "..",
    ".",
    "../x",
    "a/../x",
    "a/./x",
    "/",
    "/etc",
    "//x",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\rb",
    "a".repeat(256),
  ];
  test.each(bad)("refuses %j", (path) => {
    expect(() => splitPath(path)).toThrow("not found");
  });
  test("refuses a path over 4,096 bytes and takes one of that length", () => {
    const long = `${"x".repeat(127)}/`.repeat(32);
    const most = `${long.slice(0, 4095)}x`;
    expect(splitPath(most).length).toBe(32);
    expect(() => splitPath(`${most}x`)).toThrow("at most");
  });
});

test("quote() escapes what a terminal would obey", () => {
  expect(quote("a\x1b[31m\u202eb\u009b")).toBe('"a\\u001b[31m\\u202eb\\u009b"');
});

test("crc32Combine() equals the crc32 of the whole (many cuts)", () => {
  const bytes = randomBytes(5000, 9);
  for (const cut of [0, 1, 2, 255, 256, 4095, 4999, 5000]) {
    const [a, b] = [bytes.subarray(0, cut), bytes.subarray(cut)];
    expect(crc32Combine(crc32(a), crc32(b), b.length)).toBe(crc32(bytes));
  }
  expect(crc32Combine(crc32("x"), crc32(new Uint8Array(3 << 20)), 3 << 20)).toBe(
    crc32(new Uint8Array(3 << 20), crc32("x")),
  );
});
