/** The server as processes: workers, signals, limits, backpressure, its log. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { openSync, readFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { Remote } from "../client.ts";
import { encodeHello, encodeRequest, TO_THE_END } from "../protocol.ts";
import { StreamTarget } from "../resume.ts";
import {
  connectRaw,
  HOME,
  isAlive,
  killHard,
  makeRoot,
  randomBytes,
  residentBytes,
  runClient,
  type Server,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const getFrame = (path: string) => encodeRequest({ action: "get", path, offset: 0, length: TO_THE_END, etag: "" });

/** Opens connections that ask for a file and read nothing of the answer. */
async function deafReaders(port: number, count: number, path: string) {
  const sockets = Array.from({ length: count }, () => connect({ host: "127.0.0.1", port }));
  for (const socket of sockets) {
    socket.on("error", () => {});
    socket.pause();
    socket.write(Buffer.concat([encodeHello(), getFrame(path)]));
  }
  await Promise.all(sockets.map((socket) => new Promise((resolve) => socket.once("connect", resolve))));
  return { sockets, [Symbol.dispose]: () => sockets.forEach((socket) => void socket.destroy()) };
}

/** Established connections at the server's port, by /proc/net/tcp. */
function connectionsTo(port: number): number {
  const local = `0100007F:${port.toString(16).toUpperCase().padStart(4, "0")}`;
  const lines = readFileSync("/proc/net/tcp", "utf8").split("\n");
  return lines.filter((line) => line.includes(` ${local} `) && / 01 /.test(line) && line.indexOf(local) < 20).length;
}

function remoteOf(server: Server, options = {}): Remote {
  return new Remote({ servers: [{ host: "127.0.0.1", port: server.port }], ...options });
}

describe("starting", () => {
  test("the first line on stdout names the address, and stderr how to open it", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path);
    expect(server.address).toMatch(/^127\.0\.0\.1:\d+$/);
    await waitFor("the hint", () => server.stderr().includes("--host 0.0.0.0 opens it"));
    expect(server.workers().length).toBe(2);
  });

  test("a taken port is named and gives status 1 (also another reprise's)", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path);
    const second = Bun.spawn([process.execPath, join(HOME, "server.ts"), root.path, "--port", String(server.port)], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    expect(await second.exited).toBe(1);
    expect(await new Response(second.stderr).text()).toContain(`127.0.0.1:${server.port} is taken`);
    expect(await new Response(second.stdout).text()).toBe("");
  });

  const wrong: [string[], number, string][] = [
    [["--port", "99999"], 2, "--port takes a whole number from 0 to 65535"],
    [["--port", "abc"], 2, "--port takes a whole number"],
    [["--port"], 2, "--port needs a value"],
    [["--workers", "0"], 2, "--workers takes"],
    [["--limit-rate", "fast"], 2, "--limit-rate takes a size"],
    [["--prot", "1"], 2, "did you mean --port?"],
    [["--log", "xml"], 2, "--log takes pretty or json"],
    [["a", "b"], 2, 'does not take "b"'],
    [["/nonexistent/root"], 3, "not found: the root folder"],
    [[join(HOME, "package.json")], 4, "not a folder"],
    [["--host", "203.0.113.9"], 1, "cannot listen on 203.0.113.9"],
  ];
  test.each(wrong)("server.ts %j gives status %d and says why", async (args, status, text) => {
    const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), ...args], {
      cwd: HOME,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const errors = await new Response(child.stderr).text();
    expect(errors).toContain(text);
    expect(errors.trim().split("\n").length).toBe(1);
    expect(await child.exited).toBe(status);
  });

  test("--help and --version go to stdout with status 0", async () => {
    for (const [option, text] of [
      ["--help", "--idle-timeout"],
      ["--version", "0."],
    ] as const) {
      const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), option], {
        stdio: ["ignore", "pipe", "pipe"],
      });
      expect(await new Response(child.stdout).text()).toContain(text);
      expect(await child.exited).toBe(0);
    }
  });
});

describe("requests", () => {
  test("ten on one connection, answered in order, one log line each", async () => {
    using root = makeRoot({ "0": "zero", "1": "one", "sub/2": "two" });
    await using server = await startServer(root.path);
    const raw = await connectRaw(server.port);
    const requests = ["0", "1", "sub/2", "no", "0", "1", "sub/2", "../x"].map(getFrame);
    raw.socket.write(Buffer.concat([encodeHello(), ...requests, encodeRequest({ action: "stat", path: "0" })]));
    raw.socket.write(encodeRequest({ action: "quit" }));
    await waitFor("the server closes after QUIT", () => raw.closed());
    await waitFor("ten lines", () => server.log.filter((line) => line.peer).length === 10);
    expect(server.log.map((line) => `${line.event} ${line.path ?? ""} ${line.bytes} ${line.status}`)).toEqual([
      "get 0 4 ok",
      "get 1 3 ok",
      "get sub/2 3 ok",
      "get no 0 not_found",
      "get 0 4 ok",
      "get 1 3 ok",
      "get sub/2 3 ok",
      "get ../x 0 bad_name",
      "stat 0 0 ok",
      "quit  0 ok",
    ]);
    expect(new Set(server.log.map((line) => line.worker)).size).toBe(1);
    expect(Object.keys(server.log[0]!)).toEqual("time event peer worker path offset bytes ms status".split(" "));
  });

  test("an unknown version gets an ERROR that names the one spoken", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path);
    using raw = await connectRaw(server.port);
    raw.socket.write(encodeHello({ version: 9 }));
    await waitFor("closed", () => raw.closed());
    expect(raw.received().toString()).toContain("version 9 is not spoken here, only 1");
  });

  const garbage: [string, Uint8Array][] = [
    ["HTTP", Buffer.from("GET / HTTP/1.1\r\nHost: x\r\n\r\n")],
    ["TLS", Buffer.from("16030100f8010000f40303", "hex")],
    ["random bytes", randomBytes(100_000, 5)],
    ["zeros", new Uint8Array(100)],
    ["a HELLO without its magic", Buffer.from("0000000c01ede9ad00010203040001000000000000", "hex")],
    ["a length of 2^32-1", Buffer.from("ffffffff01", "hex")],
    ["a request after HELLO that is none", Buffer.concat([encodeHello(), Buffer.from("0000000055dd235266", "hex")])],
  ];
  test("garbage is closed, with one log line, and harms nobody", async () => {
    using root = makeRoot({ a: "fine" });
    await using server = await startServer(root.path);
    for (const [what, bytes] of garbage) {
      const before = server.log.length;
      using raw = await connectRaw(server.port);
      raw.socket.write(bytes);
      await waitFor(`${what} is closed`, () => raw.closed());
      await waitFor(`${what} is logged`, () => server.log.length > before);
      expect(server.log.slice(before).map((line) => `${line.event} ${line.status}`)).toEqual(["close bad_frame"]);
    }
    expect((await runClient(server.address, ["cat", "a"])).output).toBe("fine");
  });
});

describe("limits", () => {
  test("--max-connections: one more is told `busy`, which the client retries until there is room", async () => {
    using root = makeRoot({ a: "content" });
    await using server = await startServer(root.path, { args: ["--workers", "1", "--max-connections", "2"] });
    const first = await connectRaw(server.port);
    using _second = await connectRaw(server.port);
    const refused = await runClient(server.address, ["cat", "a", "--retries", "0"]);
    expect(refused.status).toBe(9);
    expect(refused.errors).toContain("too many connections");
    const patient = spawnClient(server.address, ["cat", "a"]);
    await waitFor("it was turned away", () => server.log.filter((line) => line.status === "busy").length >= 2);
    first.socket.terminate();
    expect(await new Response(patient.stdout).text()).toBe("content");
    expect(await patient.exited).toBe(0);
  });

  test("--idle-timeout closes who says nothing and who reads nothing, and logs it", async () => {
    using root = makeRoot({});
    writeLargeFile(join(root.path, "big"), 64 << 20);
    await using server = await startServer(root.path, { args: ["--idle-timeout", "1"] });
    using silent = await connectRaw(server.port);
    using greeted = await connectRaw(server.port);
    greeted.socket.write(encodeHello());
    using _deaf = await deafReaders(server.port, 1, "big");
    await waitFor("all are closed", () => silent.closed() && greeted.closed());
    await waitFor("the deaf one too", () =>
      server.log.some((line) => line.event === "get" && line.status === "timeout"),
    );
    expect(greeted.received().toString()).toContain("closed for lack of activity");
  });

  test("--limit-rate holds, per connection, whatever it is", async () => {
    using root = makeRoot({ a: randomBytes(300_000) });
    await using server = await startServer(root.path, { args: ["--limit-rate", "200K"] });
    const started = performance.now();
    const { stdout } = await runClient(server.address, ["cat", "a"]);
    expect(stdout.length).toBe(300_000);
    // Not faster than the limit allows; how much slower is the machine's affair.
    expect(performance.now() - started).toBeGreaterThan(1000);
  });

  test("a low --limit-rate sends what is due when it is due (1K, and a rate that no chunk divides)", async () => {
    using root = makeRoot({ a: randomBytes(6_000) });
    await using slow = await startServer(root.path, { args: ["--limit-rate", "1K"] });
    const run = await runClient(slow.address, ["cat", "a", "--timeout", "5", "--retries", "0"]);
    expect([run.status, run.stdout.length]).toEqual([0, 6_000]);
    writeLargeFile(join(root.path, "big"), 2 << 20);
    await using odd = await startServer(root.path, { args: ["--limit-rate", "2.3M"] });
    const child = spawnClient(odd.address, ["cat", "big", "--retries", "0"]);
    let bytes = 0;
    for await (const part of child.stdout) {
      bytes += part.length;
      await Bun.sleep(part.length / 1000);
    }
    expect([await child.exited, bytes]).toEqual([0, 2 << 20]);
  });

  test("--idle-timeout also ends a frame that comes byte by byte", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: ["--idle-timeout", "0.4"] });
    using raw = await connectRaw(server.port);
    const dripping = setInterval(() => raw.closed() || raw.socket.write(new Uint8Array(1)), 20);
    await waitFor("it is closed", () => raw.closed());
    clearInterval(dripping);
  });

  test("peers that announce large frames and drip hold up nobody else", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path, { args: ["--workers", "1"] });
    const announced = encodeRequest({ action: "stat", path: "x".repeat(4000) }).subarray(0, 20);
    const drippers = await Promise.all(Array.from({ length: 100 }, () => connectRaw(server.port)));
    for (const { socket } of drippers) socket.write(announced);
    const remote = remoteOf(server);
    for (let round = 0; round < 20; round++) {
      for (const { socket } of drippers) socket.write(new Uint8Array(1));
      expect((await remote.stat("a")).size).toBe(1);
    }
    remote.close();
    for (const dripper of drippers) dripper[Symbol.dispose]();
  });

  test("connections beyond --max-connections are told so, and then closed without a word", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: ["--workers", "1", "--max-connections", "5"] });
    const tried = await Promise.allSettled(Array.from({ length: 300 }, () => connectRaw(server.port)));
    // Some are closed before they know that they were connected.
    const all = tried.flatMap((one) => (one.status === "fulfilled" ? [one.value] : []));
    await waitFor("most are closed", () => all.filter((raw) => !raw.closed()).length <= 5 + 64);
    expect(all.filter((raw) => !raw.closed()).length).toBeGreaterThanOrEqual(5);
    for (const raw of all) raw[Symbol.dispose]();
  });

  test("descriptors that do not suffice for --max-connections lower it, and this is said", async () => {
    using root = makeRoot({ a: "1" });
    const command = `ulimit -n 300; exec "$0" "$1" "$2" --port 0 --workers 1 --log json`;
    const child = Bun.spawn(["sh", "-c", command, process.execPath, join(HOME, "server.ts"), root.path], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    const errors = child.stderr.getReader();
    let said = "";
    for (let part = await errors.read(); !part.done && !said.includes("taking 86"); part = await errors.read())
      said += new TextDecoder().decode(part.value);
    expect(said).toContain("taking 86");
    await child.stdout.getReader().read();
    child.kill("SIGINT");
    expect(await child.exited).toBe(0);
  });

  test("a reader that stops costs a chunk: 200 of them leave others their speed and the worker its memory", async () => {
    using root = makeRoot({});
    const digest = writeLargeFile(join(root.path, "big"), 100 << 20);
    await using server = await startServer(root.path, { args: ["--workers", "1"] });
    using _deaf = await deafReaders(server.port, 200, "big");
    using folder = temporaryFolder();
    const { status } = await runClient(server.address, ["get", "big", "-d", folder.path]);
    expect(status).toBe(0);
    expect(new Bun.CryptoHasher("sha256").update(await Bun.file(join(folder.path, "big")).bytes()).digest("hex")).toBe(
      digest,
    );
    expect(await residentBytes(server.workers()[0]!)).toBeLessThan(150e6);
  });
});

describe("signals", () => {
  async function nobodyListens(server: Server): Promise<void> {
    await waitFor(
      "nobody listens",
      async () => (await runClient(server.address, ["ls", "--retries", "0"])).status === 8,
    );
  }

  async function withDownloads(server: Server, count: number): Promise<ReturnType<typeof spawnClient>[]> {
    const clients = Array.from({ length: count }, () =>
      spawnClient(server.address, ["cat", "big", "--limit-rate", "1M", "--retries", "0"]),
    );
    await waitFor("all are served", () => server.log.filter((line) => line.event === "get").length >= count);
    return clients;
  }

  test("SIGINT with 20 downloads under way: every socket closed, no process left, status 0", async () => {
    using root = makeRoot({});
    writeLargeFile(join(root.path, "big"), 64 << 20);
    await using server = await startServer(root.path);
    const workers = server.workers();
    const clients = await withDownloads(server, 20);
    expect(await server.stop("SIGINT")).toBe(0);
    expect(workers.filter(isAlive)).toEqual([]);
    expect(connectionsTo(server.port)).toBe(0);
    for (const client of clients) {
      await new Response(client.stdout).bytes();
      expect(await client.exited).toBe(8);
    }
  });

  test("SIGTERM lets a transfer end, sends idle clients away, accepts nobody, status 0", async () => {
    using root = makeRoot({ a: randomBytes(2_000_000) });
    await using server = await startServer(root.path, { args: ["--limit-rate", "2M", "--grace", "20"] });
    using idle = await connectRaw(server.port);
    idle.socket.write(encodeHello());
    // One that the worker does not know yet would only be closed.
    await waitFor("it is greeted", () => idle.received().length > 0);
    const running = spawnClient(server.address, ["cat", "a"]);
    const reader = running.stdout.getReader();
    let bytes = (await reader.read()).value?.length ?? 0;
    const stopped = server.stop("SIGTERM");
    await waitFor("the idle one is gone", () => idle.closed());
    expect(idle.received().toString()).toContain("the server is stopping");
    await waitFor(
      "nobody listens",
      async () => (await runClient(server.address, ["ls", "--retries", "0"])).status === 8,
    );
    for (let part = await reader.read(); !part.done; part = await reader.read()) bytes += part.value.length;
    expect(bytes).toBe(2_000_000);
    expect(await running.exited).toBe(0);
    expect(await stopped).toBe(0);
  });

  test("SIGTERM to the whole process group is one SIGTERM", async () => {
    using root = makeRoot({ a: randomBytes(2_000_000) });
    await using server = await startServer(root.path, { args: ["--limit-rate", "2M", "--grace", "20"] });
    const running = spawnClient(server.address, ["cat", "a", "--retries", "0"]);
    const reader = running.stdout.getReader();
    let bytes = (await reader.read()).value?.length ?? 0;
    for (const pid of server.workers()) process.kill(pid, "SIGTERM");
    const stopped = server.stop("SIGTERM");
    for (let part = await reader.read(); !part.done; part = await reader.read()) bytes += part.value.length;
    expect([await running.exited, bytes, await stopped]).toEqual([0, 2_000_000, 0]);
  });

  test("a worker that hangs does not keep the server from ending", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path, { args: ["--grace", "0.1"] });
    const workers = server.workers();
    process.kill(workers[0]!, "SIGSTOP");
    expect(await server.stop("SIGTERM")).toBe(0);
    await waitFor("no worker is left", () => workers.every((pid) => !isAlive(pid)));
  });

  test("SIGTERM ends what outlives --grace, in words, and a second SIGTERM at once", async () => {
    using root = makeRoot({});
    writeLargeFile(join(root.path, "big"), 64 << 20);
    for (const signals of [["SIGTERM"], ["SIGTERM", "SIGTERM"]] as const) {
      const grace = signals.length === 1 ? "0.2" : "1000";
      await using server = await startServer(root.path, { args: ["--limit-rate", "1M", "--grace", grace] });
      const client = spawnClient(server.address, ["cat", "big", "--retries", "0"]);
      const reader = client.stdout.getReader();
      expect((await reader.read()).done).toBe(false);
      if (signals.length === 2) {
        server.process.kill("SIGTERM");
        await nobodyListens(server);
      }
      expect(await server.stop("SIGTERM")).toBe(0);
      for (let part = await reader.read(); !part.done; ) part = await reader.read();
      const errors = await new Response(client.stderr).text();
      if (signals.length === 1) expect(errors).toContain("the server is stopping");
      expect([8, 9]).toContain(await client.exited);
    }
  });

  test("a worker that is killed is replaced, and the downloads it served go on elsewhere", async () => {
    using root = makeRoot({ a: randomBytes(3_000_000) });
    await using server = await startServer(root.path, { args: ["--limit-rate", "3M"] });
    const client = spawnClient(server.address, ["cat", "a"]);
    const before = server.workers();
    const reader = client.stdout.getReader();
    let bytes = (await reader.read()).value?.length ?? 0;
    before.forEach(killHard);
    for (let part = await reader.read(); !part.done; part = await reader.read()) bytes += part.value.length;
    expect(bytes).toBe(3_000_000);
    expect(await client.exited).toBe(0);
    const areNew = (workers: number[]) => workers.length === 2 && workers.every((pid) => !before.includes(pid));
    await waitFor("two new workers", () => areNew(server.workers()));
    await waitFor("it is logged", () => server.log.filter((line) => line.event === "worker").length >= 2);
    expect(server.log.filter((line) => line.event === "worker").length).toBe(2);
  });

  test("workers end with a supervisor that is killed", async () => {
    using root = makeRoot({});
    await using server = await startServer(root.path);
    const workers = server.workers();
    await server.stop("SIGKILL");
    await waitFor("the workers are gone", () => workers.every((pid) => !isAlive(pid)));
    expect(workers.length).toBe(2);
  });
});

test.each(["json", "pretty"])("a log that cannot be written loses lines, not clients (%s)", async (format) => {
  using root = makeRoot({ a: "1" });
  const command = `exec "$0" "$1" "$2" --port 0 --workers 1 --log ${format} 2>/dev/full`;
  const child = Bun.spawn(["sh", "-c", command, process.execPath, join(HOME, "server.ts"), root.path], {
    stdio: ["ignore", "pipe", "ignore"],
  });
  const first = new TextDecoder().decode((await child.stdout.getReader().read()).value);
  const address = first.trim().replace("listening tcp://", "");
  for (let round = 0; round < 5; round++) {
    expect((await runClient(address, ["cat", "a", "--retries", "0"])).output).toBe("1");
  }
  child.kill("SIGINT");
  expect(await child.exited).toBe(0);
});

test("without the C library the server reads and writes, and gives the same bytes", async () => {
  using root = makeRoot({ "sub/x": "x" });
  const digest = writeLargeFile(join(root.path, "big"), 20 << 20);
  await using server = await startServer(root.path, { env: { REPRISE_FFI: "0" } });
  using folder = temporaryFolder();
  const { status } = await runClient(server.address, ["get", "big", "sub/x", "-d", folder.path], {
    env: { REPRISE_FFI: "0" },
  });
  expect(status).toBe(0);
  expect(new Bun.CryptoHasher("sha256").update(await Bun.file(join(folder.path, "big")).bytes()).digest("hex")).toBe(
    digest,
  );
});

test("many clients at once are spread over the workers and all served", async () => {
  using root = makeRoot({ a: randomBytes(500_000) });
  await using server = await startServer(root.path);
  const fd = openSync("/dev/null", "w");
  const remotes = Array.from({ length: 100 }, () => remoteOf(server));
  await Promise.all(
    remotes.map(async (remote) => {
      const target = new StreamTarget(fd, "null");
      expect((await remote.download("a", target)).size).toBe(500_000);
      target.close();
      remote.close();
    }),
  );
  await waitFor("100 lines", () => server.log.filter((line) => line.event === "get").length === 100);
  expect(new Set(server.log.map((line) => line.worker)).size).toBe(2);
});
