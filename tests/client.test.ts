/** The client as a process: what each command prints, where it writes, and the exit status of each thing that fails. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { parseServers, Remote } from "../client.ts";
import {
  HOME,
  ifStill,
  makeRoot,
  peakResidentBytes,
  randomBytes,
  runClient,
  type Server,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const image = randomBytes(2_500_000, 7);
const files = {
  "photo.png": image,
  empty: "",
  "sub/a b é.txt": "words\n",
  "sub/deep/x": "x",
  twin: "1",
  "sub/twin": "2",
};

async function setUp() {
  const root = makeRoot(files);
  const server = await startServer(root.path);
  const folder = temporaryFolder();
  return {
    root: root.path,
    server,
    folder: folder.path,
    run: (...args: string[]) => runClient(server.address, args, { cwd: folder.path }),
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      root[Symbol.dispose]();
      folder[Symbol.dispose]();
    },
  };
}

describe("get", () => {
  test("brings files into client_root/, with their time, and leaves nothing else", async () => {
    await using it = await setUp();
    utimesSync(join(it.root, "photo.png"), 1_000_000_000.123456, 1_000_000_000.123456);
    const run = await it.run("get", "photo.png", "empty", "sub/a b é.txt");
    expect(run).toMatchObject({ status: 0, output: "", errors: "" });
    const got = join(it.folder, "client_root");
    expect(readdirSync(got).sort()).toEqual(["a b é.txt", "empty", "photo.png"]);
    expect(readFileSync(join(got, "photo.png")).equals(image)).toBe(true);
    expect(readFileSync(join(got, "a b é.txt"), "utf8")).toBe("words\n");
    expect(statSync(join(got, "empty")).size).toBe(0);
    expect(statSync(join(got, "photo.png")).mtimeMs).toBeCloseTo(1_000_000_000_123.456, 2);
  });

  test("sends nothing for a file that is complete, and replaces one that is not the server's", async () => {
    await using it = await setUp();
    expect((await it.run("get", "photo.png")).status).toBe(0);
    const again = await it.run("get", "photo.png", "--json");
    expect(again).toMatchObject({ status: 0, errors: "client_root/photo.png is complete already\n" });
    expect(JSON.parse(again.output)).toMatchObject({ path: "photo.png", size: image.length, offset: image.length });
    writeFileSync(join(it.folder, "client_root/photo.png"), "edited here");
    expect((await it.run("get", "photo.png", "-q")).status).toBe(0);
    expect(readFileSync(join(it.folder, "client_root/photo.png")).equals(image)).toBe(true);
    // The first and the last: all lines have come when the server has ended.
    await it.server.stop("SIGINT");
    expect(it.server.log.filter((line) => line.event === "get").length).toBe(2);
  });

  test("-o and -d say where to, -o - is stdout, --json tells what was done", async () => {
    await using it = await setUp();
    expect((await it.run("get", "photo.png", "-o", "new/p.png")).status).toBe(0);
    expect((await it.run("get", "twin", "--directory=there")).status).toBe(0);
    expect(readFileSync(join(it.folder, "new/p.png")).equals(image)).toBe(true);
    expect(readFileSync(join(it.folder, "there/twin"), "utf8")).toBe("1");
    expect(Buffer.from((await it.run("get", "photo.png", "empty", "twin", "-o", "-")).stdout)).toEqual(
      Buffer.concat([image, Buffer.from("1")]),
    );
    const { output } = await it.run("get", "sub/deep/x", "--json");
    expect(JSON.parse(output)).toMatchObject({ path: "sub/deep/x", file: "client_root/x", size: 1, offset: 0 });
  });

  test("to a device or a named pipe streams", async () => {
    await using it = await setUp();
    expect(await it.run("get", "photo.png", "-o", "/dev/null")).toMatchObject({ status: 0, errors: "" });
    Bun.spawnSync(["mkfifo", join(it.folder, "pipe")]);
    const reader = Bun.spawn(["cat", join(it.folder, "pipe")], { stdio: ["ignore", "pipe", "ignore"] });
    const bytes = new Response(reader.stdout).bytes();
    expect((await it.run("get", "photo.png", "-o", "pipe")).status).toBe(0);
    expect(Buffer.from(await bytes).equals(image)).toBe(true);
  });

  test("to a descriptor by its name: into what is open there, which stays what it is", async () => {
    await using it = await setUp();
    const before = [readlinkSync("/dev/stdout"), statSync("/dev/stdout").rdev];
    const piped = await it.run("get", "photo.png", "-o", "/dev/stdout");
    expect([piped.status, piped.errors, Buffer.from(piped.stdout).equals(image)]).toEqual([0, "", true]);
    expect([readlinkSync("/dev/stdout"), statSync("/dev/stdout").rdev]).toEqual(before);
    // Where a file is open there, only by names at which nothing could be done to the folder that they are in.
    const runBy = ["sh", "-c", 'exec "$0" "$@" > out'];
    for (const name of ["/proc/self/fd/1", "/dev/fd/1"]) {
      const args = ["get", "photo.png", "-o", name];
      expect(await runClient(it.server.address, args, { cwd: it.folder, runBy })).toMatchObject({
        status: 0,
        errors: "",
      });
      expect(readFileSync(join(it.folder, "out")).equals(image)).toBe(true);
    }
    expect(readdirSync(it.folder)).toEqual(["out"]);
  });

  test("two sources with one destination are refused before anything moves", async () => {
    await using it = await setUp();
    const run = await it.run("get", "twin", "sub/twin");
    expect(run.status).toBe(2);
    expect(run.errors).toContain('"twin" and "sub/twin" would both be written to');
    expect(existsSync(join(it.folder, "client_root"))).toBe(false);
  });

  test("every path is tried, each failure has its line, the first gives the status", async () => {
    await using it = await setUp();
    const run = await it.run("get", "no", "twin", "../x", "photo.png");
    expect(run.status).toBe(3);
    expect(run.errors.trim().split("\n")).toEqual([
      'error: not found: "no"',
      'error: not found: "../x" is not a name below the served folder',
    ]);
    expect(readdirSync(join(it.folder, "client_root")).sort()).toEqual(["photo.png", "twin"]);
  });

  test("takes memory that does not grow with the file (1 GiB)", async () => {
    await using it = await setUp();
    writeLargeFile(join(it.root, "big"), 1 << 30);
    expect(await peakMemory(it.server, ["get", "big", "-o", "/dev/null"])).toBeLessThan(100e6);
    expect(await peakMemory(it.server, ["get", "big", "-d", it.folder])).toBeLessThan(100e6);
  });

  async function peakMemory(server: Server, args: string[]): Promise<number> {
    const child = spawnClient(server.address, args);
    const peak = await peakResidentBytes(child.pid);
    expect(await child.exited).toBe(0);
    return peak;
  }
});

test("--limit-rate asks for a stretch at a time, which together are the file", async () => {
  await using it = await setUp();
  expect(await it.run("get", "photo.png", "--limit-rate", "400K")).toMatchObject({ status: 0, errors: "" });
  expect(readFileSync(join(it.folder, "client_root/photo.png")).equals(image)).toBe(true);
  await it.server.stop("SIGINT");
  const stretches = it.server.log.filter((line) => line.event === "get");
  expect(stretches.map((line) => line.offset)).toEqual([0, 400 * 1024 * 5]);
});

describe("cat", () => {
  test("writes files one after the other, also to a pipe that is read slowly", async () => {
    await using it = await setUp();
    const child = spawnClient(it.server.address, ["cat", "photo.png", "twin"]);
    const parts: Uint8Array[] = [];
    for await (const part of child.stdout) {
      parts.push(part);
      await Bun.sleep(1);
    }
    expect(Buffer.concat(parts)).toEqual(Buffer.concat([image, Buffer.from("1")]));
    expect(await child.exited).toBe(0);
  });

  test("ends quietly when the reader has had enough", async () => {
    await using it = await setUp();
    writeLargeFile(join(it.root, "big"), 100 << 20);
    const script = `set -o pipefail; "$0" "$1" cat big | head -c 10 | wc -c`;
    const { stdout, stderr, exitCode } = Bun.spawnSync(
      ["bash", "-c", script, process.execPath, join(HOME, "client.ts")],
      {
        env: { ...process.env, REPRISE_SERVER: it.server.address },
      },
    );
    expect([stdout.toString().trim(), stderr.toString(), exitCode]).toEqual(["10", "", 0]);
  });

  test("ends by SIGINT although nobody reads what it writes", async () => {
    await using it = await setUp();
    const child = spawnClient(it.server.address, ["cat", "photo.png"]);
    await waitFor("it is served", () => it.server.workers().length === 2 && child.stdout);
    const reader = child.stdout.getReader();
    await reader.read();
    child.kill("SIGINT");
    expect(await child.exited).toBe(130);
  });

  test("goes to a file by redirection, from where the shell left off", async () => {
    await using it = await setUp();
    const script = `{ echo first; "$0" "$1" cat sub/deep/x; echo; echo last; } > ${join(it.folder, "out")}`;
    Bun.spawnSync(["sh", "-c", script, process.execPath, join(HOME, "client.ts")], {
      env: { ...process.env, REPRISE_SERVER: it.server.address },
    });
    expect(readFileSync(join(it.folder, "out"), "utf8")).toBe("first\nx\nlast\n");
  });
});

describe("ls, stat, status", () => {
  test("ls lists by name, -r the folders below, -l with size and time, --json an object a line", async () => {
    await using it = await setUp();
    utimesSync(join(it.root, "twin"), 1_000_000_000.5, 1_000_000_000.5);
    expect((await it.run("ls")).output).toBe("empty\nphoto.png\nsub/\ntwin\n");
    expect((await it.run("ls", "sub/")).output).toBe("a b é.txt\ndeep/\ntwin\n");
    expect((await it.run("ls", "-r")).output).toContain("sub/deep/x\n");
    expect((await it.run("ls", "twin", "-l")).output).toBe("             1  2001-09-09 01:46:40  twin\n");
    const lines = (await it.run("ls", "--json")).output
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line));
    expect(lines.find((line) => line.path === "twin")).toEqual({
      path: "twin",
      type: "file",
      size: 1,
      mtime: "2001-09-09T01:46:40.500000Z",
    });
    expect((await it.run("ls", "nowhere")).status).toBe(3);
  });

  test("a name is escaped where a terminal would obey it", async () => {
    await using it = await setUp();
    writeFileSync(join(it.root, "sub/\x1b[31mred"), "");
    expect((await it.run("ls", "sub")).output).toContain("\\u001b[31mred\n");
    expect((await it.run("get", "\x1b[31mno")).errors).toContain("\\u001b[31mno");
  });

  test("10,000 entries and a name of 255 bytes", async () => {
    await using it = await setUp();
    mkdirSync(join(it.root, "many"));
    for (let index = 0; index < 10_000; index++) writeFileSync(join(it.root, "many", `file-${index}`), "");
    const long = `${"é".repeat(127)}x`;
    writeFileSync(join(it.root, "many", long), "long");
    expect((await it.run("ls", "many")).output.trim().split("\n").length).toBe(10_001);
    expect((await it.run("cat", `many/${long}`)).output).toBe("long");
  });

  test("stat and status, for people and as JSON", async () => {
    await using it = await setUp();
    const stat = JSON.parse((await it.run("stat", "photo.png", "--json")).output);
    expect(stat).toMatchObject({ path: "photo.png", type: "file", size: image.length });
    expect(stat.etag).toMatch(/^[0-9a-f]{16}$/);
    expect((await it.run("stat", "sub")).output).toContain("type   folder");
    expect(JSON.parse((await it.run("status", "--json")).output)).toMatchObject({
      workers: 2,
      protocol: 1,
      replicas: [],
    });
  });
});

describe("the command line refuses, with status 2 and what was meant", () => {
  const wrong: [string[], string][] = [
    [["gt", "x"], 'unknown command "gt", did you mean get?'],
    [["get"], "get needs PATH…"],
    [["get", "x", "--ouput", "y"], "unknown option --ouput, did you mean --output?"],
    [["get", "x", "-z"], "unknown option -z"],
    [["get", "x", "-o"], "-o needs a value"],
    [["get", "x", "--timeout", "-1"], "--timeout needs a value"],
    [["get", "x", "--timeout", "soon"], "--timeout takes seconds"],
    [["get", "x", "--retries=many"], "--retries takes a whole number"],
    [["get", "x", "--quiet=yes"], "--quiet takes no value"],
    [["get", "a", "b", "-o", "c"], "-o takes one file"],
    [["ls", "a", "b"], 'ls does not take "b"'],
    [["stat"], "stat needs PATH"],
    [["ls", "--server", "host:99999"], "--server takes host:port"],
    [["ls", "--server", "http://x"], "--server takes host:port"],
    [["ls", "--limit-rate", "0"], "--limit-rate takes a size"],
  ];
  test.each(wrong)("client.ts %j", async (args, text) => {
    const run = await runClient("127.0.0.1:1", args);
    expect(run).toMatchObject({ status: 2, output: "" });
    expect(run.errors).toContain(text);
    expect(run.errors.trim().split("\n").length).toBe(1);
  });

  test("but takes options before the command, joined letters, joined values and --", async () => {
    await using it = await setUp();
    const { address } = it.server;
    expect((await runClient("127.0.0.1:1", ["--server", address, "-q", "ls"])).output).toContain("photo.png");
    expect((await it.run("ls", "-rl")).output).toContain("sub/deep/x");
    expect((await it.run("get", "-qdhere", "twin")).status).toBe(2);
    expect((await it.run("get", "-qd", "here", "--", "twin")).status).toBe(0);
    writeFileSync(join(it.root, "-odd"), "odd");
    expect((await it.run("cat", "--", "-odd")).output).toBe("odd");
  });

  test("--help and --version print to stdout", async () => {
    const help = await runClient("127.0.0.1:1", ["--help"]);
    expect(help.status).toBe(0);
    for (const name of ["get", "cat", "ls", "stat", "resume", "status", "--retries"])
      expect(help.output).toContain(name);
    expect((await runClient("127.0.0.1:1", ["get", "--help"])).output).toContain("--output");
    expect((await runClient("127.0.0.1:1", ["--version"])).output).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
});

test("parseServers() takes names, ports, IPv6 and lists, and TLS for all behind the one that says so", () => {
  expect(parseServers("a,b:1,tcp://[::1]:2,[fe80::1]")).toEqual([
    { host: "a", port: 2121, tls: false },
    { host: "b", port: 1, tls: false },
    { host: "::1", port: 2, tls: false },
    { host: "fe80::1", port: 2121, tls: false },
  ]);
  const isTls = (text: string) => parseServers(text).map(({ tls }) => tls);
  expect(isTls("TLS://a,b:1")).toEqual([true, true]);
  expect(isTls("tls://a,tcp://b,c")).toEqual([true, false, false]);
});

describe("the server", () => {
  test("not running: tried again, then status 8", async () => {
    const run = await runClient("127.0.0.1:1", ["get", "x", "--retries", "2"]);
    expect(run.status).toBe(8);
    const lines = run.errors.trim().split("\n");
    expect(lines.length).toBe(3);
    expect(lines[0]).toMatch(/127\.0\.0\.1:1: nothing listens there; trying again in 0\.\d s \(1 of 2\)/);
    expect(lines[2]).toBe("error: 127.0.0.1:1: nothing listens there (given up after 2 retries)");
  });

  test("unknown host: status 8", async () => {
    const run = await runClient("no-such-host.invalid", ["ls", "--retries", "0"]);
    expect(run.status).toBe(8);
    expect(run.errors).toContain("no-such-host.invalid:2121");
  });

  test("that accepts and says nothing: --timeout ends the wait, status 8", async () => {
    using silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    const run = await runClient(`127.0.0.1:${silent.port}`, ["ls", "--timeout", "0.3", "--retries", "0"]);
    expect(run.status).toBe(8);
    expect(run.errors).toContain("no byte for 0.3 s");
  });

  test("that is none: status 9, at once", async () => {
    using http = Bun.serve({ port: 0, fetch: () => new Response("x") });
    const run = await runClient(`127.0.0.1:${http.port}`, ["ls"]);
    expect(run.status).toBe(9);
    expect(run.errors).toContain("not the reprise protocol");
  });

  test("is the next of the list when the first does not answer", async () => {
    await using it = await setUp();
    const run = await runClient(`127.0.0.1:1,${it.server.address}`, ["cat", "twin", "-q"]);
    expect(run).toMatchObject({ status: 0, output: "1", errors: "" });
  });
});

test("a server that answers no SYN: the process ends with --timeout, too", async () => {
  // A backlog that is full: further connections get no answer.
  const script =
    "import socket,time;s=socket.socket();s.bind(('127.0.0.1',0));s.listen(0);print(s.getsockname()[1],flush=True);time.sleep(100)";
  if (!Bun.which("python3")) return console.log("skipped: needs python3 for a listener with a backlog of none");
  const listener = Bun.spawn(["python3", "-c", script], { stdio: ["ignore", "pipe", "ignore"] });
  try {
    const port = Number(new TextDecoder().decode((await listener.stdout.getReader().read()).value));
    const fillers = Array.from({ length: 4 }, () => connect({ host: "127.0.0.1", port }).on("error", () => {}));
    await Promise.race(fillers.map((socket) => new Promise((resolve) => socket.once("connect", resolve))));
    const run = await runClient(`127.0.0.1:${port}`, ["ls", "--timeout", "0.5", "--retries", "0"]);
    expect(run.status).toBe(8);
    for (const socket of fillers) socket.destroy();
  } finally {
    listener.kill();
  }
});

test("stderr that cannot be written changes no exit status", async () => {
  await using it = await setUp();
  const command = `"$0" "$1" get no 2>/dev/full`;
  const { exitCode } = Bun.spawnSync(["sh", "-c", command, process.execPath, join(HOME, "client.ts")], {
    env: { ...process.env, REPRISE_SERVER: it.server.address },
  });
  expect(exitCode).toBe(3);
});

describe("refused by the server", () => {
  const cases: [string, number][] = [
    ["no/such", 3],
    ["../etc/passwd", 4],
    ["/etc/passwd", 4],
    ["a//b", 4],
    ["sub", 4],
    ["x".repeat(256), 4],
    ["new\nline", 4],
  ];
  test("each in one line with its own status, and no file left", async () => {
    await using it = await setUp();
    for (const [path, status] of cases) {
      const run = await it.run("get", path);
      expect([path, run.status]).toEqual([path, status]);
      expect(run.errors.trim().split("\n").length).toBe(1);
    }
    expect(existsSync(join(it.folder, "client_root")) ? readdirSync(join(it.folder, "client_root")) : []).toEqual([]);
  });
});

describe("the destination", () => {
  test("a folder, below a file, not writable, a missing permission: status 7 and why", async () => {
    await using it = await setUp();
    mkdirSync(join(it.folder, "is-a-folder"));
    writeFileSync(join(it.folder, "is-a-file"), "");
    const cases: [string, string][] = [
      ["is-a-folder", "is a folder; use -d"],
      ["is-a-file/x", "a part of the path is a file"],
      ["/proc/nothing", "cannot write"],
    ];
    for (const [output, text] of cases) {
      const run = await it.run("get", "twin", "-o", output);
      expect([output, run.status]).toEqual([output, 7]);
      expect(run.errors).toContain(text);
    }
  });
});

describe("names of our own", () => {
  test("a served file can't pass for a resume log or a part", async () => {
    await using it = await setUp();
    writeFileSync(join(it.root, "notes.resume.json"), "{}");
    const run = await it.run("get", "notes.resume.json");
    expect(run.status).toBe(7);
    expect(run.errors).toContain("are for unfinished transfers");
    expect((await it.run("cat", "notes.resume.json")).output).toBe("{}");
  });

  test("a part that is a link is not written through, a pipe not waited for", async () => {
    await using it = await setUp();
    mkdirSync(join(it.folder, "client_root"));
    writeFileSync(join(it.folder, "victim"), "");
    symlinkSync(join(it.folder, "victim"), join(it.folder, "client_root/photo.png.part"));
    expect((await it.run("get", "photo.png")).status).toBe(7);
    expect(readFileSync(join(it.folder, "victim"), "utf8")).toBe("");
    Bun.spawnSync([
      "mkfifo",
      join(it.folder, "client_root/twin.part"),
      join(it.folder, "client_root/empty.resume.json"),
    ]);
    expect((await it.run("get", "twin")).status).toBe(7);
    expect((await it.run("get", "empty")).status).toBe(0);
  });

  test("a named pipe that nobody reads: SIGINT ends the wait", async () => {
    await using it = await setUp();
    Bun.spawnSync(["mkfifo", join(it.folder, "pipe")]);
    const child = spawnClient(it.server.address, ["get", "twin", "-o", join(it.folder, "pipe")]);
    await waitFor(
      "it is running",
      () => readFileSync(`/proc/${child.pid}/wchan`, "utf8").length > 0 && threadsIn(child.pid, "wait_for_partner"),
    );
    child.kill("SIGINT");
    expect(await child.exited).toBe(130);
  });

  /** Whether any thread of the process waits in this kernel function. */
  function threadsIn(pid: number, place: string): boolean {
    return readdirSync(`/proc/${pid}/task`).some((id) =>
      ifStill(() => readFileSync(`/proc/${pid}/task/${id}/wchan`, "utf8"))?.includes(place),
    );
  }
});

describe("a script of commands on stdin", () => {
  test("runs line by line, with cd, quotes and comments of its own", async () => {
    await using it = await setUp();
    const script = "ls\ncd sub\nls\nget 'a b é.txt'\nget deep/x -o moved\ncd ..\nstat twin\nquit\nget never\n";
    const run = await runClient(it.server.address, [], { cwd: it.folder, stdin: script });
    expect(run).toMatchObject({ status: 0, errors: "" });
    expect(run.output).toContain("empty\nphoto.png\nsub/\ntwin\na b é.txt\ndeep/\ntwin\n");
    expect(readFileSync(join(it.folder, "client_root/a b é.txt"), "utf8")).toBe("words\n");
    expect(readFileSync(join(it.folder, "moved"), "utf8")).toBe("x");
    await waitFor("the end is logged", () => it.server.log.at(-1)?.event === "quit");
    expect(new Set(it.server.log.map((line) => line.worker)).size).toBe(1);
    expect(it.server.log.at(-1)).toMatchObject({ event: "quit", status: "ok" });
  });

  test("stops at the first failure with its status", async () => {
    await using it = await setUp();
    const run = await runClient(it.server.address, [], { cwd: it.folder, stdin: "get twin\nget no\nget empty\n" });
    expect(run).toMatchObject({ status: 3, errors: 'error: not found: "no"\n' });
    expect(readdirSync(join(it.folder, "client_root"))).toEqual(["twin"]);
    expect((await runClient(it.server.address, [], { cwd: it.folder, stdin: "git x\n" })).status).toBe(2);
  });
});

describe("what programs read", () => {
  async function writable() {
    const it = await setUp();
    await it.server.stop("SIGINT");
    const server = await startServer(it.root, { args: ["--writable"] });
    const run = (...args: string[]) => runClient(server.address, args, { cwd: it.folder });
    return Object.assign(it, { server, run, [Symbol.asyncDispose]: () => dispose(it, server) });
  }
  async function dispose(it: { root: string; folder: string }, server: Server) {
    await server[Symbol.asyncDispose]();
    for (const path of [it.root, it.folder]) rmSync(path, { recursive: true, force: true });
  }
  const ISO = "\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{6}Z";
  const done = (path: string, file: string, size: number, offset = 0) =>
    new RegExp(
      `^{"path":"${path}","file":"${file}","size":${size},"mtime":"${ISO}","etag":"[0-9a-f]{16}","offset":${offset},"ms":\\d+}\n$`,
    );

  test("--json is one object a line, with the same keys in the same order", async () => {
    await using it = await writable();
    const shapes: [string[], RegExp][] = [
      [["get", "twin"], done("twin", "client_root/twin", 1)],
      [["get", "twin"], done("twin", "client_root/twin", 1, 1)],
      [["get", "-r", "sub/deep"], done("sub/deep/x", "client_root/deep/x", 1)],
      [["put", "client_root/twin", "-t", "up"], done("up", "client_root/twin", 1)],
      [["put", "client_root/twin", "-t", "up"], done("up", "client_root/twin", 1, 1)],
      [["put", "-r", "client_root/deep", "-t", "new"], done("new/x", "client_root/deep/x", 1)],
      [["ls", "new"], new RegExp(`^{"path":"x","type":"file","size":1,"mtime":"${ISO}"}\n$`)],
      [["ls", "n*"], new RegExp(`^{"path":"new","type":"folder","size":0,"mtime":"${ISO}"}\n$`)],
      [["stat", "up"], new RegExp(`^{"path":"up","type":"file","size":1,"mtime":"${ISO}","etag":"[0-9a-f]{16}"}\n$`)],
      [["sync", "--dry-run", "new", "here"], /^{"action":"get","path":"new\/x","size":1}\n$/],
      [
        ["sync", "--up", "--dry-run", "newer", "client_root/deep"],
        /"action":"mkdir".*\n{"action":"put","path":"newer\/x","size":1}\n$/,
      ],
      [["mkdir", "made"], /^{"action":"mkdir","path":"made"}\n$/],
      [["mv", "up", "made"], /^{"action":"move","path":"up","to":"made\/up"}\n$/],
      [["rm", "-r", "made", "new/x"], /^{"action":"delete","path":"made"}\n{"action":"delete","path":"new\/x"}\n$/],
    ];
    for (const [args, shape] of shapes) {
      const run = await it.run(...args, "--json");
      expect([args.join(" "), run.status]).toEqual([args.join(" "), 0]);
      expect(run.output).toMatch(shape);
    }
  });

  test("in a shell: a failure is one for ||, pipefail and &&, and nothing comes of an input cut short", async () => {
    await using it = await writable();
    const shell = (script: string) => {
      const words = ["bash", "-c", `set -o pipefail; C="$0 $1"; ${script}`];
      const { stdout, exitCode } = Bun.spawnSync([...words, process.execPath, join(HOME, "client.ts")], {
        cwd: it.folder,
        env: { ...process.env, REPRISE_SERVER: it.server.address },
        stderr: "ignore",
      });
      return [stdout.toString(), exitCode];
    };
    expect(shell("$C get no || echo fallback")).toEqual(["fallback\n", 0]);
    expect(shell("$C get twin && cat client_root/twin")).toEqual(["1", 0]);
    expect(shell("$C cat no | cat")).toEqual(["", 3]);
    expect(shell("$C cat twin sub/twin | wc -c")).toEqual(["2\n", 0]);
    expect(shell("tar c client_root | $C put - -t b.tar && $C cat b.tar | tar t")).toEqual([
      "client_root/\nclient_root/twin\n",
      0,
    ]);
    expect(shell("printf abc | $C put - -t cut --size 4")).toEqual(["", 7]);
    expect(shell("$C stat cut")).toEqual(["", 3]);
    expect(shell("$C ls --json | head -n 1 | wc -l")).toEqual(["1\n", 0]);
  });
});

test("a script on stdin takes put, rm, mv, mkdir, sync and get -r, and stops at the first failure", async () => {
  using root = makeRoot({ "d/x": "1", "d/e/y": "2", old: "3" });
  using folder = makeRoot({ "up/z": "4", one: "5" });
  await using server = await startServer(root.path, { args: ["--writable"] });
  const script = [
    "mkdir -p made/deep",
    "cd made",
    `put ${folder.path}/one`,
    `put -r ${folder.path}/up -t deep`,
    "mv ../old here",
    "rm one",
    "get -r /d",
    "get '/d/x*' -d picked",
    `sync /d ${folder.path}/synced`,
    "rm ../d",
    "mkdir never",
  ];
  const run = await runClient(server.address, [], {
    cwd: folder.path,
    stdin: script.map((line) => `${line}\n`).join(""),
  });
  expect(run.status).toBe(4);
  expect(run.errors).toContain("rm -r removes it");
  expect(names(root.path)).toEqual([
    "d",
    "d/e",
    "d/e/y",
    "d/x",
    "made",
    "made/deep",
    "made/deep/up",
    "made/deep/up/z",
    "made/here",
  ]);
  expect(names(join(folder.path, "client_root"))).toEqual(["d", "d/e", "d/e/y", "d/x"]);
});

/** As a person would see them: without the server's own. */
function names(folder: string): string[] {
  return treeOf(folder).map((line) => line.replace(/ (file|folder).*/, ""));
}

describe("Remote", () => {
  test("serves many calls on one connection and reconnects when the server has closed it", async () => {
    using root = makeRoot({ a: "1" });
    await using server = await startServer(root.path, { args: ["--idle-timeout", "4"] });
    const notes: string[] = [];
    const remote = new Remote({
      servers: [{ host: "127.0.0.1", port: server.port }],
      note: (text) => notes.push(text),
    });
    for (let round = 0; round < 10; round++) expect((await remote.stat("a")).size).toBe(1);
    await waitFor("all are logged", () => server.log.filter(({ event }) => event === "stat").length === 10);
    expect(new Set(server.log.map((line) => line.worker)).size).toBe(1);
    await waitFor("the server lets go of it", () => server.log.some((line) => line.status === "idle"));
    expect((await remote.stat("a")).size).toBe(1);
    expect(notes).toEqual([]);
    remote.close();
  });

  test("calls at the same time take turns, each with its own answer", async () => {
    await using it = await setUp();
    const remote = new Remote({ servers: [{ host: "127.0.0.1", port: it.server.port }] });
    const listing = Array.fromAsync(remote.list("", true));
    const sizes = await Promise.all(["twin", "photo.png", "sub/a b é.txt"].map((path) => remote.stat(path)));
    expect(sizes.map((meta) => meta.size)).toEqual([1, image.length, 6]);
    expect((await listing).length).toBe(8);
    remote.close();
  });

  test("abandoning a list half-way leaves the next call its own answers", async () => {
    await using it = await setUp();
    const remote = new Remote({ servers: [{ host: "127.0.0.1", port: it.server.port }] });
    for await (const entry of remote.list("", true)) {
      expect(entry.path).not.toBe("");
      break;
    }
    expect((await remote.stat("twin")).size).toBe(1);
    remote.close();
  });
});
