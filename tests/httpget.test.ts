/** Large reads of a bucket past `fetch`: what gateways may answer, well or ill, and whose memory it comes into. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { once } from "node:events";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { Bucket } from "../bucket.ts";
import { HttpGetter } from "../httpget.ts";
import { S3 } from "../s3.ts";
import { randomBytes, runClient, sha256, startServer, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const CONTENT = randomBytes(MIB + 1);
const never = new AbortController().signal;

interface Gateway extends AsyncDisposable {
  url: URL;
  /** As they came. */
  requests: string[];
  /** Connections: ever, and now. */
  count: number;
  open: Set<Socket>;
}

/** Answers with the `index`-th request what it is told to, byte for byte. */
async function startGateway(
  answer: (socket: Socket, request: string, index: number) => unknown,
  host = "127.0.0.1",
): Promise<Gateway> {
  const server = createServer((socket) => {
    gateway.count++;
    gateway.open.add(socket);
    socket.on("close", () => gateway.open.delete(socket));
    socket.on("error", () => {});
    let text = "";
    socket.on("data", (chunk) => {
      text += chunk.toString("latin1");
      for (let end = text.indexOf("\r\n\r\n"); end >= 0; end = text.indexOf("\r\n\r\n")) {
        gateway.requests.push(text.slice(0, end));
        text = text.slice(end + 4);
        answer(socket, gateway.requests.at(-1)!, gateway.requests.length - 1);
      }
    });
  });
  await once(server.listen(0, host), "listening");
  const { port } = server.address() as AddressInfo;
  const gateway: Gateway = {
    url: new URL(`http://${host.includes(":") ? `[${host}]` : host}:${port}`),
    requests: [],
    count: 0,
    open: new Set(),
    async [Symbol.asyncDispose]() {
      for (const socket of gateway.open) socket.destroy();
      server.close();
      await once(server, "close");
    },
  };
  return gateway;
}

const headOf = (length: number, ...more: string[]) =>
  [`HTTP/1.1 206 Partial Content`, `Content-Length: ${length}`, `ETag: "e"`, ...more, "\r\n"].join("\r\n");
const HEAD = headOf(CONTENT.length);

/** As it ought to be. */
function answerWell(socket: Socket): void {
  socket.write(HEAD);
  socket.write(CONTENT);
}

async function get(getter: HttpGetter, length = CONTENT.length, signal = never) {
  const place = new Uint8Array(length);
  const headers = await getter.get("/b/f?x=1", { host: "h", range: "bytes=0-" }, place, signal);
  return { headers, place };
}

const clientOf = ({ url }: Gateway) =>
  new S3({ bucket: "b", region: "r", endpoint: url.origin, accessKeyId: "x", secretAccessKey: "x" });

function expectContent(bytes: Uint8Array): void {
  expect(bytes.length).toBe(CONTENT.length);
  expect(Buffer.compare(bytes, CONTENT)).toBe(0);
}

test("HttpGetter.get() fills the place, again and again over one connection", async () => {
  await using gateway = await startGateway(answerWell);
  const getter = new HttpGetter(gateway.url);
  for (let round = 0; round < 5; round++) {
    const { headers, place } = await get(getter);
    expect(headers?.get("etag")).toBe('"e"');
    expectContent(place);
  }
  expect(gateway.requests[4]).toBe("GET /b/f?x=1 HTTP/1.1\r\nhost: h\r\nrange: bytes=0-");
  expect({ count: gateway.count, requests: gateway.requests.length }).toEqual({ count: 1, requests: 5 });
});

test("HttpGetter.get() at a time take a connection each, of which some are kept", async () => {
  await using gateway = await startGateway(answerWell);
  const getter = new HttpGetter(gateway.url);
  for (const { place } of await Promise.all(Array.from({ length: 12 }, () => get(getter)))) expectContent(place);
  expect(gateway.count).toBe(12);
  await waitFor("the others are closed", () => gateway.open.size === 4);
});

test("HttpGetter.get() of an answer that comes in pieces, cut anywhere", async () => {
  const all = Buffer.concat([Buffer.from(HEAD), CONTENT]);
  await using gateway = await startGateway(async (socket) => {
    socket.setNoDelay();
    let at = 0;
    for (; at < HEAD.length + 3; at++) {
      socket.write(all.subarray(at, at + 1));
      await Bun.sleep(0);
    }
    for (let size = 1; at < all.length; at += size, size = Math.min(2 * size + 1, 100_000)) {
      socket.write(all.subarray(at, at + size));
      await Bun.sleep(0);
    }
  });
  const { headers, place } = await get(new HttpGetter(gateway.url));
  expect(headers?.get("content-length")).toBe(String(CONTENT.length));
  expectContent(place);
});

test("HttpGetter.get() over IPv6", async () => {
  await using gateway = await startGateway(answerWell, "::1");
  expectContent((await get(new HttpGetter(gateway.url))).place);
});

/** With what follows it, and whether it is understood but for its content: then the next is asked for as well. */
const OTHERS: [name: string, answer: string, isUnderstood: boolean][] = [
  ["another status", "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", true],
  ["another version by now", "HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n", true],
  ["a busy gateway", "HTTP/1.1 503 Slow Down\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true],
  ["a way to elsewhere", "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", true],
  ["a shorter one", `${headOf(2)}no`, true],
  ["a longer one", headOf(CONTENT.length + 1), true],
  ["all in place of a range", HEAD.replace("206", "200"), false],
  ["chunks", headOf(CONTENT.length, "Transfer-Encoding: chunked"), false],
  ["no length", HEAD.replace(/Content-Length: \d+\r\n/, ""), false],
  ["two lengths", headOf(CONTENT.length, "Content-Length: 3"), false],
  ["the length twice", headOf(CONTENT.length, `Content-Length: ${CONTENT.length}`), false],
  ["a length that is no number", HEAD.replace("Length: ", "Length: +"), false],
  ["HTTP/1.0", HEAD.replace("1.1", "1.0"), false],
  ["100 Continue before it", `HTTP/1.1 100 Continue\r\n\r\n${HEAD}`, true],
  ["a line without a name", headOf(CONTENT.length, "no name"), false],
  ["a line that goes on in the next", headOf(CONTENT.length, "X: a", " b"), false],
  ["a name with a blank behind it", headOf(CONTENT.length, "X : a"), false],
  ["something that is no HTTP", "220 mail ready\r\n\r\n", false],
  ["a head without an end", `${HEAD.slice(0, -2)}X: ${"x".repeat(17_000)}`, false],
];

test.each(OTHERS)("HttpGetter.get() leaves to fetch: %s", async (_, answer, isUnderstood) => {
  await using gateway = await startGateway((socket) => void socket.write(answer));
  const getter = new HttpGetter(gateway.url);
  expect((await get(getter)).headers).toBeUndefined();
  await waitFor("the connection is closed", () => gateway.open.size === 0);
  expect((await get(getter)).headers).toBeUndefined();
  expect(gateway.requests.length).toBe(isUnderstood ? 2 : 1);
});

test.each([
  ["at once", ""],
  ["in the head", HEAD.slice(0, 30)],
  ["behind the head", HEAD],
  ["in the content", `${HEAD}some`],
])("HttpGetter.get() of an answer that is cut %s, by an end or a reset", async (_, answer) => {
  await using gateway = await startGateway((socket, _, index) => {
    if (index % 2 === 0) socket.end(answer);
    else socket.write(answer, () => socket.resetAndDestroy());
  });
  const getter = new HttpGetter(gateway.url);
  for (let round = 0; round < 4; round++) await expect(get(getter)).rejects.toThrow();
  await waitFor("all are closed", () => gateway.requests.length === 4 && gateway.open.size === 0);
});

test("HttpGetter.get() throws where nobody is", async () => {
  const gateway = await startGateway(answerWell);
  await gateway[Symbol.asyncDispose]();
  await expect(get(new HttpGetter(gateway.url))).rejects.toThrow();
});

test("HttpGetter.get() goes over no connection that has more to say, or is at its end", async () => {
  const closing = headOf(CONTENT.length, "Connection: Close");
  const ways: ((socket: Socket) => void)[] = [
    (socket) => socket.write(Buffer.concat([Buffer.from(HEAD), CONTENT, Buffer.from("more")])),
    (socket) => socket.write(Buffer.concat([Buffer.from(closing), CONTENT])),
    (socket) => socket.end(Buffer.concat([Buffer.from(HEAD), CONTENT])),
    // When nobody has asked.
    answerWell,
    answerWell,
  ];
  await using gateway = await startGateway((socket, _, index) => ways[index]!(socket));
  const getter = new HttpGetter(gateway.url);
  for (const [index] of ways.entries()) {
    expectContent((await get(getter)).place);
    // When nobody has asked.
    if (ways[index] === answerWell) for (const socket of gateway.open) socket.write(HEAD);
    await waitFor("it is closed", () => gateway.open.size === 0);
    expect(gateway.count).toBe(index + 1);
  }
});

test("HttpGetter.get() that is given up frees its connection, and leaves its place alone", async () => {
  const half = CONTENT.length >> 1;
  await using gateway = await startGateway((socket) => {
    socket.write(HEAD);
    socket.write(CONTENT.subarray(0, half));
  });
  const stop = new AbortController();
  const place = new Uint8Array(CONTENT.length);
  const getting = new HttpGetter(gateway.url).get("/", {}, place, AbortSignal.any([stop.signal]));
  await waitFor("half of it has come", () => place[half - 1] === CONTENT[half - 1] && place[half - 2] !== 0);
  const [socket] = gateway.open;
  stop.abort(new Error("enough"));
  place.fill(0);
  socket!.write(CONTENT.subarray(half));
  await expect(getting).rejects.toThrow("enough");
  await waitFor("the connection is closed", () => gateway.open.size === 0);
  expect(place.every((byte) => byte === 0)).toBe(true);
  await expect(get(new HttpGetter(gateway.url), 1, stop.signal)).rejects.toThrow("enough");
});

test("HttpGetter.get() puts nothing into a request that does not belong there", async () => {
  await using gateway = await startGateway(answerWell);
  const getter = new HttpGetter(gateway.url);
  for (const value of ["a\r\nb: c", "a\nb", "\0", "é"])
    expect(await getter.get("/", { x: value }, new Uint8Array(1), never)).toBeUndefined();
  expect(await getter.get("/ \r\n", {}, new Uint8Array(1), never)).toBeUndefined();
  expect(gateway.count).toBe(0);
});

test("HttpGetter.for() leaves TLS and proxies to fetch", () => {
  const plain = new URL("http://h:1");
  expect(HttpGetter.for(plain, {})).toBeDefined();
  expect(HttpGetter.for(new URL("https://h"), {})).toBeUndefined();
  expect(HttpGetter.for(plain, { http_proxy: "http://p" })).toBeUndefined();
  expect(HttpGetter.for(plain, { HTTP_PROXY: "http://p" })).toBeUndefined();
});

// ------------------------------------------------------------------------------------------------------------ S3

const read = (s3: S3, withinMs?: number, spare?: Uint8Array) =>
  s3.read("f", "e", 0, CONTENT.length, withinMs === undefined ? undefined : { withinMs }, spare);

test("S3.read() takes the memory that it is given, if that is of the right size", async () => {
  await using gateway = await startGateway(answerWell);
  const spare = new Uint8Array(CONTENT.length);
  expect(await read(clientOf(gateway), undefined, spare)).toBe(spare);
  expectContent(spare);
  const small = new Uint8Array(CONTENT.length - 1);
  expectContent(await read(clientOf(gateway), undefined, small));
});

test("S3.read() of what only fetch understands", async () => {
  await using gateway = await startGateway((socket) => {
    socket.write(
      `HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nETag: "e"\r\n\r\n${CONTENT.length.toString(16)}\r\n`,
    );
    socket.write(CONTENT);
    socket.write("\r\n0\r\n\r\n");
  });
  const s3 = clientOf(gateway);
  for (let round = 0; round < 3; round++) expectContent(await read(s3));
  expect(gateway.requests.length).toBe(4);
});

test("S3.read() tries again what was cut", async () => {
  await using gateway = await startGateway((socket, _, index) => {
    if (index === 0) socket.end();
    else if (index === 1) socket.end(`${HEAD}half of it`);
    else answerWell(socket);
  });
  expectContent(await read(clientOf(gateway)));
});

test("S3.read() does not wait for ever", async () => {
  await using gateway = await startGateway((socket, _, index) => {
    if (index % 2 === 1) socket.write(`${HEAD}some`);
  });
  const s3 = clientOf(gateway);
  for (let round = 0; round < 2; round++) {
    const reading = read(s3, 300).catch((error) => error);
    await waitFor("it is asked", () => gateway.requests.length > round);
    // The limit is nobody's but its own by now.
    Bun.gc(true);
    expect(await reading).toMatchObject({ code: "Unreachable", message: expect.stringContaining("no answer in time") });
  }
  await waitFor("the connections are closed", () => gateway.open.size === 0);
});

test("S3.read() says what S3 says", async () => {
  const body = "<Error><Code>NoSuchKey</Code></Error>";
  const answers = [
    `HTTP/1.1 404 Not Found\r\nContent-Length: ${body.length}\r\n\r\n${body}`,
    `HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n`,
    `${headOf(2)}no`,
  ];
  await using gateway = await startGateway((socket, _, index) => socket.write(answers[Math.min(index >> 1, 2)]!));
  const s3 = clientOf(gateway);
  for (const code of ["NoSuchKey", "PreconditionFailed", "IncompleteBody"])
    expect(await read(s3).catch((error) => error)).toMatchObject({ code });
});

test("S3.read() takes no other version for the one that was asked for", async () => {
  await using gateway = await startGateway(answerWell);
  const reading = clientOf(gateway).read("f", "another", 0, CONTENT.length);
  expect(await reading.catch((error) => error)).toMatchObject({ code: "PreconditionFailed" });
});

// ------------------------------------------------------------------------------------------------------------ a root

/** Of a gateway that has one object of zeros, but for what each 8 bytes say of their place; pieces are counted. */
function memoryOf(size: number) {
  const used = new Set<ArrayBufferLike>();
  const pieces: number[] = [];
  const s3 = {
    settings: { bucket: "b" },
    address: "memory",
    head: async () => ({ size, etag: "e", modifiedMs: 0, mtime: undefined }),
    async read(_key: string, _etag: string, offset: number, length: number, _limits: unknown, spare?: Uint8Array) {
      const place = spare?.length === length ? spare : new Uint8Array(length);
      // As a gateway's content: some time later, in place of what was there.
      place.fill(0xee);
      await Bun.sleep(1);
      used.add(place.buffer);
      pieces.push(length);
      return patternAt(offset, place);
    },
  };
  return { bucket: new Bucket(s3 as unknown as S3, "", {}), used, pieces };
}

function patternAt(offset: number, place: Uint8Array): Uint8Array {
  new Uint32Array(place.buffer, 0, place.length >> 2).forEach((_, at, words) => {
    words[at] = offset / 4 + at;
  });
  return place;
}

test("a file of a bucket is read through a few pieces of memory", async () => {
  const { bucket, used, pieces } = memoryOf(128 * MIB);
  const file = await bucket.root.open("f");
  const length = MIB / 2;
  for (let at = 0; at < file.meta.size; at += length)
    expect(Buffer.compare(await file.read(at, length), patternAt(at, new Uint8Array(length)))).toBe(0);
  file.close();
  expect(pieces.filter((size) => size === 8 * MIB).length).toBeGreaterThan(10);
  // Smaller ones at the start, three of the largest.
  expect(used.size).toBeLessThan(pieces.length - 8);
});

test("what is read of a bucket stays as it is: large until the next reading, small for good", async () => {
  const { bucket } = memoryOf(96 * MIB);
  const file = await bucket.root.open("f");
  const lengths = [4, 60 * 1024, MIB, 64 * 1024, 3 * MIB, 12, 512 * 1024, 64 * 1024 - 4];
  const small: { at: number; content: Uint8Array }[] = [];
  for (let at = 0, turn = 0; at < file.meta.size; turn++) {
    const length = Math.min(lengths[turn % lengths.length]!, file.meta.size - at);
    const content = await file.read(at, length);
    // Others have their turn, and what is read ahead comes.
    await Bun.sleep(2);
    expect(Buffer.compare(content, patternAt(at, new Uint8Array(length)))).toBe(0);
    if (length < 64 * 1024) small.push({ at, content });
    at += length;
  }
  for (const { at, content } of small)
    expect(Buffer.compare(content, patternAt(at, new Uint8Array(content.length)))).toBe(0);
});

test("what was read last stays as it is when the file is closed", async () => {
  const { bucket } = memoryOf(64 * MIB);
  const [one, other] = [await bucket.root.open("f"), await bucket.root.open("f")];
  const length = MIB / 2;
  const at = 40 * MIB;
  for (let before = 0; before < at; before += length) await one.read(before, length);
  const content = await one.read(at, length);
  one.close();
  for (let next = 0; next < other.meta.size; next += length) await other.read(next, length);
  expect(Buffer.compare(content, patternAt(at, new Uint8Array(length)))).toBe(0);
  other.close();
});

test.each(["0", "1"])("a server of a bucket sends its files whole (REPRISE_FFI=%s)", async (ffi) => {
  const content = randomBytes(40 * MIB + 12_345, 3);
  await using gateway = await startGateway((socket, request) => {
    const [, first, last] = /\r\nrange: bytes=(\d+)-(\d+)/i.exec(request) ?? [];
    const part = first === undefined ? "" : content.subarray(Number(first), Number(last) + 1);
    const time = "Last-Modified: Fri, 02 Jan 2026 03:04:05 GMT";
    if (request.startsWith("HEAD")) socket.write(headOf(content.length, time).replace("206 Partial Content", "200 OK"));
    else if (first === undefined) socket.write(listOf("<ListBucketResult></ListBucketResult>"));
    else socket.write(Buffer.concat([Buffer.from(headOf(part.length, time)), Buffer.from(part)]));
  });
  const env = {
    AWS_ENDPOINT_URL: gateway.url.origin,
    AWS_ACCESS_KEY_ID: "x",
    AWS_SECRET_ACCESS_KEY: "x",
    REPRISE_FFI: ffi,
  };
  await using server = await startServer("s3://bucket", { env, args: ["--workers", "1"] });
  using folder = temporaryFolder();
  const back = join(folder.path, "back");
  const runs = Array.from({ length: 3 }, (_, index) =>
    runClient(server.address, ["get", "f", "-o", `${back}${index}`]),
  );
  for (const [index, run] of runs.entries()) {
    expect(await run).toMatchObject({ status: 0 });
    expect(await sha256(`${back}${index}`)).toBe(new Bun.CryptoHasher("sha256").update(content).digest("hex"));
  }
  // Large pieces came past fetch, which says more of itself.
  expect(gateway.requests.some((request) => request.startsWith("GET") && !/user-agent/i.test(request))).toBe(true);
});

const listOf = (body: string) => `HTTP/1.1 200 OK\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
