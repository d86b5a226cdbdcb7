"""Certificates of an authority of the test's own, as PEM files."""

from datetime import datetime, timedelta, timezone
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


class Authority:
    """Signs; its own certificate is `ca`, a path."""

    def __init__(self, folder, name="an authority"):
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self._name, self._key.public_key(), DAY)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca = self._write(f"{name.replace(' ', '-')}.pem", made.sign(self._key, hashes.SHA256()))

    def issue(self, name, valid_for=DAY):
        """(certificate, key) files for 127.0.0.1; `valid_for` may be over."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")])
        made = self._builder(subject, key.public_key(), valid_for).add_extension(names, critical=False)
        cert = self._write(f"{name}.pem", made.sign(self._key, hashes.SHA256()))
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path = self.folder / f"{name}.key"
        path.write_bytes(key.private_bytes(*pem))
        path.chmod(0o600)
        return cert, str(path)

    def _builder(self, subject, public_key, valid_for):
        now = datetime.now(timezone.utc)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now - 2 * DAY).not_valid_after(now + valid_for)

    def _write(self, name, certificate):
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)
