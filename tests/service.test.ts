/** The server as a service: what its manager is told, the unit file, and an ordinary user with a root it cannot write. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { encodeHello } from "../protocol.ts";
import {
  freePort,
  HOME,
  makeRoot,
  runClient,
  type ServerOptions,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
} from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

const python = Bun.which("python3");
if (!python) console.log("skipped: the tests of what the service manager is told need python3");

/**
 * A service manager: prints each message, in hex, with how many listen at the port when it comes and what one of them
 * says to HELLO. It has what python3-minimal has.
 */
const MANAGER = `
import socket, sys
address, port, hello = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind("\\0" + address[1:] if address[0] == "@" else address)
print("bound", flush=True)
while True:
    message = manager.recv(4096).hex()
    rows = [line.split() for line in open("/proc/net/tcp").readlines()[1:]]
    listeners = sum(row[1].endswith(":%04X" % port) and row[3] == "0A" for row in rows)
    try:
        client = socket.create_connection(("127.0.0.1", port), 10)
        client.sendall(hello)
        answer = client.recv(4096)[4:5].hex()
        client.close()
    except OSError:
        answer = ""
    print(message, listeners, answer, flush=True)
`;

interface Told {
  message: string;
  /** Sockets that listen at the port. */
  listeners: number;
  /** The type of the frame that answers HELLO, in hex. */
  answer: string;
}

async function startManager(address: string, port: number): Promise<{ told: Told[] } & AsyncDisposable> {
  const child = Bun.spawn({
    cmd: [python!, "-c", MANAGER, address, String(port), Buffer.from(encodeHello()).toString("hex")],
    stdio: ["ignore", "pipe", "inherit"],
  });
  const told: Told[] = [];
  let bound = false;
  const reading = (async () => {
    let rest = "";
    for await (const chunk of child.stdout.pipeThrough(new TextDecoderStream() as never) as AsyncIterable<string>) {
      const lines = (rest + chunk).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        if (line === "bound") bound = true;
        else told.push(toldIn(line));
      }
    }
  })();
  await waitFor("the manager has its socket", () => bound);
  return {
    told,
    async [Symbol.asyncDispose]() {
      child.kill();
      await reading;
    },
  };
}

function toldIn(line: string): Told {
  const [message, listeners, answer] = line.split(" ") as [string, string, string];
  return { message: Buffer.from(message, "hex").toString(), listeners: Number(listeners), answer };
}

const messages = ({ told }: { told: Told[] }) => told.map(({ message }) => message);
const WELCOME = "80";

describe.skipIf(!python)("the service manager is told", () => {
  const name = () => `@reprise-test-${process.pid}-${Math.random().toString(36).slice(2)}`;

  test.each(["a path", "an abstract name"])("by %s: READY=1 when all workers answer, STOPPING=1", async (kind) => {
    using root = makeRoot({ f: "1" });
    using folder = temporaryFolder();
    const address = kind === "a path" ? join(folder.path, "notify") : name();
    const port = freePort();
    await using manager = await startManager(address, port);
    await using server = await startServer(root.path, { port, env: { NOTIFY_SOCKET: address } });
    await waitFor("it is ready", () => manager.told.length > 0);
    expect(manager.told).toEqual([{ message: "READY=1", listeners: 2, answer: WELCOME }]);
    for (const pid of server.workers()) {
      expect(readFileSync(`/proc/${pid}/environ`, "utf8").split("\0")).not.toContain(`NOTIFY_SOCKET=${address}`);
    }
    expect(await server.stop("SIGTERM")).toBe(0);
    await waitFor("it stops", () => manager.told.length > 1);
    expect(messages(manager)).toEqual(["READY=1", "STOPPING=1"]);
  });

  test("STOPPING=1 once, also when a second signal comes", async () => {
    using root = makeRoot({ f: "1" });
    const address = name();
    const port = freePort();
    await using manager = await startManager(address, port);
    await using server = await startServer(root.path, { port, env: { NOTIFY_SOCKET: address } });
    server.process.kill("SIGTERM");
    server.process.kill("SIGINT");
    expect(await server.process.exited).toBe(0);
    const last = Bun.spawnSync({
      cmd: [process.execPath, "-e", 'import { notify } from "./systemd.ts"; notify("STATUS=last");'],
      cwd: HOME,
      env: { ...process.env, NOTIFY_SOCKET: address },
    });
    expect(last.exitCode).toBe(0);
    await waitFor("all has come", () => messages(manager).includes("STATUS=last"));
    expect(messages(manager)).toEqual(["READY=1", "STOPPING=1", "STATUS=last"]);
  });

  test("RELOADING=1 and READY=1 around SIGHUP", async () => {
    using root = makeRoot({ f: "1" });
    const address = name();
    const port = freePort();
    await using manager = await startManager(address, port);
    await using server = await startServer(root.path, { port, env: { NOTIFY_SOCKET: address } });
    await waitFor("it is ready", () => manager.told.length === 1);
    server.process.kill("SIGHUP");
    await waitFor("it is ready again", () => manager.told.length === 3);
    expect(messages(manager)[1]).toMatch(/^RELOADING=1\nMONOTONIC_USEC=\d+$/);
    expect(manager.told[2]).toEqual({ message: "READY=1", listeners: 2, answer: WELCOME });
  });

  test("without stopping for a manager that reads nothing: its queue is full, and the server serves", async () => {
    using root = makeRoot({ f: "1" });
    using folder = temporaryFolder();
    const address = join(folder.path, "notify");
    // Bound, filled to the brim, and left.
    const script = `
import socket, sys, time
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(sys.argv[1])
client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
client.setblocking(False)
try:
    while True: client.sendto(b"X=1", sys.argv[1])
except OSError: print("full", flush=True)
sys.stdin.read()
manager.setblocking(False)
try:
    while True:
        message = manager.recv(4096)
        if message != b"X=1": print(message.decode(), flush=True)
        time.sleep(0.001)
except OSError: pass
manager.setblocking(True)
while True: print(manager.recv(4096).decode(), flush=True)
`;
    const deaf = Bun.spawn({ cmd: [python!, "-c", script, address], stdio: ["pipe", "pipe", "inherit"] });
    let said = "";
    const reading = (async () => {
      const decoder = new TextDecoder();
      for await (const chunk of deaf.stdout) said += decoder.decode(chunk);
    })();
    try {
      await waitFor("the queue is full", () => said === "full\n");
      await using server = await startServer(root.path, { env: { NOTIFY_SOCKET: address } });
      expect((await runClient(server.address, ["cat", "f"])).output).toBe("1");
      await deaf.stdin.end();
      await waitFor("it is told in the end", () => said.includes("READY=1"));
    } finally {
      deaf.kill();
      await reading;
    }
  });

  test("RELOADING=1 with the time on the clock that the manager reads", async () => {
    const address = name();
    await using manager = await startManager(address, freePort());
    const script = 'import { notify, notifyReloading } from "./systemd.ts"; notifyReloading(); notify("READY=1");';
    const now = () =>
      Number(Bun.spawnSync([python!, "-c", "import time; print(time.monotonic_ns() // 1000)"]).stdout.toString());
    const before = now();
    const run = Bun.spawnSync({
      cmd: [process.execPath, "-e", script],
      cwd: HOME,
      env: { ...process.env, NOTIFY_SOCKET: address },
    });
    const after = now();
    expect(run.stderr.toString()).toBe("");
    await waitFor("both have come", () => manager.told.length === 2);
    const [reloading, ready] = messages(manager);
    const micros = Number(/^RELOADING=1\nMONOTONIC_USEC=(\d+)$/.exec(reloading!)?.[1]);
    expect(micros).toBeGreaterThanOrEqual(before);
    expect(micros).toBeLessThanOrEqual(after);
    expect(ready).toBe("READY=1");
  });

  test("without bun:ffi by systemd-notify, and a warning says what that needs, once", async () => {
    if (!Bun.which("systemd-notify")) return console.log("skipped: systemd-notify is not installed");
    using root = makeRoot({ f: "1" });
    const address = name();
    const port = freePort();
    await using manager = await startManager(address, port);
    const env = { NOTIFY_SOCKET: address, REPRISE_FFI: "0" };
    await using server = await startServer(root.path, { port, env });
    // systemd-notify also sends what tells it that its message was read.
    const states = () => messages(manager).filter((message) => message !== "BARRIER=1");
    await waitFor("it is ready", () => states().length > 0);
    expect(await server.stop("SIGTERM")).toBe(0);
    await waitFor("it stops", () => states().length > 1);
    expect(states()).toEqual(["READY=1", "STOPPING=1"]);
    expect(server.stderr().match(/NotifyAccess=all/g)?.length).toBe(1);
  });
});

test.each([
  { what: "that nobody has", address: "/nonexistent/notify" },
  { what: "too long for any", address: `/${"x".repeat(200)}` },
])("a NOTIFY_SOCKET $what: a warning, and the server serves", async ({ address }) => {
  using root = makeRoot({ f: "1" });
  await using server = await startServer(root.path, { env: { NOTIFY_SOCKET: address } });
  await waitFor("the warning", () => server.stderr().includes("the service manager is not told"));
  expect((await runClient(server.address, ["cat", "f"])).output).toBe("1");
  expect(await server.stop("SIGTERM")).toBe(0);
  expect(server.stderr().match(/is not told/g)?.length).toBe(1);
});

// ---------------------------------------------------------------------------------------------------- the unit

describe("reprise.service", () => {
  const unit = readFileSync(join(HOME, "reprise.service"), "utf8");

  test("systemd-analyze finds nothing wrong with it", () => {
    if (!Bun.which("systemd-analyze")) return console.log("skipped: systemd-analyze is not installed");
    using folder = temporaryFolder();
    // Its Documentation and the way to bun are of a machine where it is installed.
    const here = unit.replaceAll("/usr/bin/bun", process.execPath).replaceAll("/opt/reprise", HOME);
    const verify = (text: string) => {
      const file = join(folder.path, "reprise.service");
      writeFileSync(file, text);
      const { exitCode, stderr } = Bun.spawnSync(["systemd-analyze", "verify", "--man=no", file]);
      const about = stderr.toString().split("\n");
      return { exitCode, complaints: about.filter((line) => line.includes("reprise.service")) };
    };
    expect(verify(here)).toEqual({ exitCode: 0, complaints: [] });
    expect(verify(here.replace("KillMode=mixed", "KillMode=some")).complaints.length).toBe(1);
  });

  test("the command that it runs is one that the server takes", async () => {
    const words = /^ExecStart=(.*)$/m.exec(unit)![1]!.split(" ").slice(2);
    const options = words.slice(1).join(" ").replace("--host 0.0.0.0", "--host 127.0.0.1").split(" ");
    using root = makeRoot({ f: "1" });
    await using server = await startServer(root.path, { args: options });
    expect((await runClient(server.address, ["cat", "f"])).output).toBe("1");
  });
});

// ---------------------------------------------------------------------------------------------------- ordinary user

const isRoot = process.getuid?.() === 0;
const NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
const canBeOrdinary = !isRoot || Bun.which("setpriv") !== null;
if (!canBeOrdinary) console.log("skipped: the tests of an ordinary user need setpriv, or to be run as one");

/** A copy of bun and the server where everybody may read it, which a home folder is not. */
function installForAll(): { path: string; program: [string, string] } & Disposable {
  const folder = temporaryFolder();
  for (const name of readdirSync(HOME)) {
    if (/^[a-z0-9]+\.ts$|^package\.json$/.test(name)) copyFileSync(join(HOME, name), join(folder.path, name));
  }
  mkdirSync(join(folder.path, "node_modules"));
  for (const name of ["citty", "consola"]) {
    cpSync(join(HOME, "node_modules", name), join(folder.path, "node_modules", name), { recursive: true });
  }
  Bun.spawnSync(["chmod", "-R", "a+rX", folder.path]);
  const bun = join(folder.path, "bun");
  provideBun(bun);
  return {
    path: folder.path,
    program: [bun, join(folder.path, "server.ts")],
    [Symbol.dispose]: folder[Symbol.dispose],
  };
}

/** A hard link costs nothing, but has bun's own mode, which is not ours to change. */
function provideBun(name: string): void {
  const forAll = 0o005;
  if ((statSync(process.execPath).mode & forAll) === forAll) {
    try {
      linkSync(process.execPath, name);
      return;
    } catch {
      // On another file system, or another user's.
    }
  }
  copyFileSync(process.execPath, name);
  chmodSync(name, 0o755);
}

describe.skipIf(!canBeOrdinary)("an ordinary user with a root that it cannot write", () => {
  const setUp = () => {
    const root = makeRoot({ f: "1", "d/g": "2" });
    const installed = installForAll();
    chmodSync(join(root.path, "d"), 0o555);
    chmodSync(root.path, 0o555);
    const options: ServerOptions = {
      program: installed.program,
      cwd: installed.path,
      runBy: isRoot ? NOBODY : [],
      env: { HOME: "/nonexistent" },
    };
    return {
      root: root.path,
      options,
      [Symbol.dispose]() {
        chmodSync(root.path, 0o755);
        chmodSync(join(root.path, "d"), 0o755);
        root[Symbol.dispose]();
        installed[Symbol.dispose]();
      },
    };
  };

  test("get and ls work, and puts are refused", async () => {
    using it = setUp();
    using folder = makeRoot({ new: "3" });
    await using server = await startServer(it.root, it.options);
    for (const pid of [server.process.pid, ...server.workers()]) {
      const uid = /Uid:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))![1];
      expect(uid).toBe(isRoot ? "65534" : String(process.getuid?.()));
    }
    const run = (...args: string[]) => runClient(server.address, args, { cwd: folder.path });
    expect(await run("get", "-r", "/", "-d", "got")).toMatchObject({ status: 0, errors: "" });
    expect(readFileSync(join(folder.path, "got/d/g"), "utf8")).toBe("2");
    expect((await run("ls", "-r")).output.split("\n").sort()).toEqual(["", "d/", "d/g", "f"]);
    const put = await run("put", "new");
    expect(put.status).toBe(4);
    expect(put.errors).toBe("error: refused: the server is read-only; started with --writable it takes changes\n");
    expect(existsSync(join(it.root, ".reprise"))).toBe(false);
    expect(await server.stop("SIGTERM")).toBe(0);
  });

  test("--writable does not start: status 4, and a line that says why", async () => {
    using it = setUp();
    const { program, cwd, runBy, env } = it.options;
    const child = Bun.spawn({
      cmd: [...runBy!, ...program!, it.root, "--port", "0", "--writable"],
      cwd: cwd!,
      env: { ...process.env, ...env },
      stdio: ["ignore", "pipe", "pipe"],
    });
    const errors = await new Response(child.stderr).text();
    expect(errors).toBe(`error: "${it.root}" cannot be written (EACCES); start without --writable to only serve it\n`);
    expect(await child.exited).toBe(4);
    expect(await new Response(child.stdout).text()).toBe("");
  });
});
