/**
 * Certificates for the tests of TLS, made by openssl once for each run, in a folder that goes with the process: two
 * roots, and leaves that are right or wrong in one way each.
 */
import { appendFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** Without it there are no certificates to test with. */
export const hasOpenssl = Bun.which("openssl") !== null;

/** The options of a server that shows a certificate, and its two files. */
export interface Pair {
  cert: string;
  key: string;
  args: string[];
}

const HERE = "DNS:localhost,IP:127.0.0.1,IP:::1";
const YEAR_MS = 365 * 24 * 3600 * 1000;

/** Who signs, for what names, from when on and until when, in years from now. */
interface Leaf {
  issuer?: string;
  names?: string;
  from?: number;
  until?: number;
}

const LEAVES = {
  good: {},
  /** Right as well, to take its place. */
  renewed: {},
  elsewhere: { names: "DNS:example.org" },
  byName: { names: "DNS:localhost" },
  byAddress: { names: "IP:127.0.0.1" },
  /** For machines of a network of its own: see faults/namespaces.ts. */
  machines: { names: "IP:10.0.0.1,IP:10.0.0.2,IP:10.0.0.3" },
  expired: { from: -2, until: -1 },
  early: { from: 1, until: 2 },
  stranger: { issuer: "otherRoot" },
  /** With the intermediate's certificate behind it in the file. */
  chained: { issuer: "intermediate" },
} satisfies Record<string, Leaf>;
const OF_ITSELF = "selfSigned";

const CONFIG = `
[req]
distinguished_name = subject
prompt = no
[subject]
CN = reprise test
[ca]
default_ca = issuer
[issuer]
new_certs_dir = .
database = ./index
unique_subject = no
rand_serial = yes
default_md = sha256
policy = anything
copy_extensions = copy
[anything]
commonName = supplied
[authority]
basicConstraints = critical,CA:true
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical,CA:false
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
`;

let made: string | undefined;

/** The folder of them all; made when first asked for. */
function folder(): string {
  if (made !== undefined) return made;
  const path = mkdtempSync(join(tmpdir(), "reprise-certificates-"));
  process.on("exit", () => rmSync(path, { recursive: true, force: true }));
  writeFileSync(join(path, "config"), CONFIG);
  writeFileSync(join(path, "index"), "");
  makeRoot(path, "root", "authority");
  makeRoot(path, "otherRoot", "authority");
  makeRoot(path, OF_ITSELF, "leaf", HERE);
  sign(path, "intermediate", "authority", {});
  for (const [name, leaf] of Object.entries(LEAVES)) sign(path, name, "leaf", leaf);
  made = path;
  return path;
}

/** The file of a root's certificate, for --ca. */
export function authority(name: "root" | "otherRoot" | "intermediate" = "root"): string {
  return join(folder(), `${name}.pem`);
}

/** A server's certificate and key. */
export function pair(name: keyof typeof LEAVES | typeof OF_ITSELF): Pair {
  return pairOf(join(folder(), `${name}.pem`), join(folder(), `${name}.key`));
}

export function pairOf(cert: string, key: string): Pair {
  return { cert, key, args: ["--tls-cert", cert, "--tls-key", key] };
}

function makeRoot(path: string, name: string, extensions: string, names?: string): void {
  const more = names === undefined ? [] : ["-addext", `subjectAltName=${names}`];
  const files = ["-keyout", `${name}.key`, "-out", `${name}.pem`, "-days", "3650"];
  request(path, name, ["-x509", ...files, "-extensions", extensions, ...more]);
}

function sign(path: string, name: string, extensions: string, leaf: Leaf): void {
  const { issuer = "root", names = HERE, from = -1, until = 10 } = leaf;
  const more = extensions === "leaf" ? ["-addext", `subjectAltName=${names}`] : [];
  request(path, name, ["-keyout", `${name}.key`, "-out", `${name}.csr`, ...more]);
  const times = ["-startdate", timeOf(from), "-enddate", timeOf(until)];
  const by = ["-cert", `${issuer}.pem`, "-keyfile", `${issuer}.key`, "-extensions", extensions];
  openssl(path, [
    "ca",
    "-config",
    "config",
    "-batch",
    "-notext",
    "-in",
    `${name}.csr`,
    "-out",
    `${name}.pem`,
    ...by,
    ...times,
  ]);
  if (issuer === "intermediate")
    appendFileSync(join(path, `${name}.pem`), readFileSync(join(path, "intermediate.pem")));
}

function request(path: string, name: string, more: string[]): void {
  const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
  openssl(path, ["req", "-config", "config", "-subj", `/CN=reprise test ${name}`, ...key, ...more]);
}

function timeOf(years: number): string {
  return new Date(Date.now() + years * YEAR_MS).toISOString().replace(/[-:T]|\.\d+/g, "");
}

function openssl(cwd: string, args: string[]): void {
  const { exitCode, stderr } = Bun.spawnSync(["openssl", ...args], { cwd, stdio: ["ignore", "ignore", "pipe"] });
  if (exitCode !== 0) throw new Error(`openssl ${args[0]}: ${stderr}`);
}
